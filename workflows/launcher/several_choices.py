"""comfy-cli, run as a program, without its check of widgets that hold several choices: ComfyUI checks them itself."""

from __future__ import annotations

from typing import Any

from comfy_cli.__main__ import main
from comfy_cli.cql import engine

_check = engine._validate_literal_value  # of comfy-cli 1.23.0, which is pinned


def check(
    node_id: str, class_type: str, input_name: str, port: Any, value: Any, **options: Any
) -> tuple[list[dict], list[dict]]:
    """comfy-cli's errors and warnings for one value; none for a list, which it would refuse."""
    if isinstance(value, dict) and value.keys() == {"__value__"}:
        return [], []
    return _check(node_id, class_type, input_name, port, value, **options)


engine._validate_literal_value = check

if __name__ == "__main__":
    main()
