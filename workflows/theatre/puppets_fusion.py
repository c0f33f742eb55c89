"""Trains a fusion embedding for the theatre by its own optimiser; the shipped one began with one that this made.

Writes `.cache/training/puppets_fusion/puppets_fusion.safetensors`; tests/experiments/shipped_file.py goes on from the
one in the repository's history, and from no other.

    python workflows/theatre/puppets_fusion.py                 # every stage to its end, going on where it was
    python workflows/theatre/puppets_fusion.py --minutes 20    # stop and save after 20 minutes of a stage
    python workflows/theatre/puppets_fusion.py --stage export  # write the file from what has been trained

Stages: `combiner` and `generator`, both stages of the method, by the pack's own training, beside the shipped
`puppets_sd` and `puppets_vision`, which stay as they are; then `export`. State lies under
`.cache/training/puppets_fusion`; delete what follows a stage that is trained again.
"""

import argparse
import logging
import math

if __name__ == "__main__":
    import entry

    entry.enter("puppets_fusion")

import entry
import fusion_pairs
import fusion_stages
from fusion_generator import Config

STAGES = ("combiner", "generator", "export")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=("all", *STAGES), default="all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop and save after so many minutes")
    entry.add_options(parser, Config)
    options = parser.parse_args()
    config, folder = entry.chosen(options, Config), entry.state("puppets_fusion")
    # The pack's training reports its steps there.
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    pictures = fusion_pairs.rendered(folder, config.pairs, config.size, config.seed)["pictures"]
    stages = {"combiner": fusion_stages.train_combiner, "generator": fusion_stages.train_generator}
    for name, train in stages.items():
        if options.stage in ("all", name) and not train(folder, pictures, config, options.minutes):
            print(f"stopped in stage {name}; call again to go on")
            return
    if options.stage in ("all", "export"):
        fusion_stages.export(folder, pictures, config, folder / fusion_stages.FUSION.name)


if __name__ == "__main__":
    main()
