"""Trains the theatre's video identity adapter; writes `workflows/models/loras/puppets_wan_identity.safetensors`.

    python workflows/theatre/puppets_wan_identity.py                # to the end, going on where it was
    python workflows/theatre/puppets_wan_identity.py --minutes 20   # stop and save after 20 minutes

For the exported `puppets_wan.safetensors`, with the clips and the autoencoder that puppets_wan.py trained.
"""

import argparse
import dataclasses
import json
import math

if __name__ == "__main__":
    import entry

    entry.enter("puppets_wan")

import entry
import half_files
import puppets_wan
import wan_adapter
from pack.nodes.consent import record

ADAPTER = entry.MODELS / "loras" / "puppets_wan_identity.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    entry.add_options(parser, wan_adapter.Config)
    options = parser.parse_args()
    config = entry.chosen(options, wan_adapter.Config)
    adapter = wan_adapter.train(
        entry.state("puppets_wan"), config, puppets_wan.TRANSFORMER, puppets_wan.ENCODER, minutes=options.minutes
    )
    if adapter is None:
        print("stopped; call again to go on")
        return
    training = {"config": json.dumps({"training": dataclasses.asdict(config)})}
    half_files.save_half(ADAPTER, adapter.tensors(), training | record.to_metadata(half_files.NOBODY))
    print(f"{ADAPTER.name}: {ADAPTER.stat().st_size / 2**20:.2f} MiB, sha256 {half_files.sha256(ADAPTER)}")


if __name__ == "__main__":
    main()
