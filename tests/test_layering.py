"""Who may import and call what: formulas without ComfyUI, one place that patches, one room that touches files."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import PurePosixPath

import pytest
from launcher.scripts import ROOT
from support.shipped import shipped_modules, tree

COMFYUI_MODULES = {
    "comfy", "comfy_api", "comfy_extras", "comfy_execution", "comfy_config", "folder_paths", "nodes",
    "server", "execution", "latent_preview", "node_helpers", "app", "utils",
}
PATCHING_CALLS = re.compile(
    r"set_model_(?!options)\w+|add_patches|add_object_patch|add_wrapper(_with_key)?|add_callback(_with_key)?"
    r"|set_injections|add_hook_patches"
)
FILE_CALLS = {"safe_open", "save_file", "load_file", "load_torch_file", "save_torch_file"}


def formulas() -> list[str]:
    """The modules that hold the mathematics, and may not know ComfyUI."""
    return [
        name for name in shipped_modules()
        if name.startswith("kernels/") or PurePosixPath(name).name in ("method.py", "config.py")
        or name in ("nodes/training/loop.py", "nodes/training/objective.py", "nodes/consent/record.py")
    ]


def imports(name: str) -> Iterator[tuple[int, str]]:
    """(level, module) of each import statement of a file, wherever in it; `from .. import a` names ..a."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node.level, module) for module in names)


WITHOUT_COMFYUI = """
import importlib, sys, types
class NoHost:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {modules!r}:
            raise ImportError("imports ComfyUI's " + name)
sys.meta_path.insert(0, NoHost())
pack = types.ModuleType("pack")
pack.__path__ = [{root!r}]
sys.modules["pack"] = pack
for name in {names!r}:
    importlib.import_module("pack." + name)
    print(name)
"""


def test_formulas_import_without_comfyui(tmp_path):
    """In a separate process, since the other tests have imported ComfyUI into this one."""
    names = [name.removesuffix(".py").replace("/", ".") for name in formulas()]
    names = [name.removesuffix(".__init__") for name in names]
    assert "kernels.spectral_guidance" in names and "nodes.frequency_guidance.method" in names
    code = WITHOUT_COMFYUI.format(modules=COMFYUI_MODULES, root=str(ROOT), names=names)
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == names


def test_formulas_name_no_comfyui_module_even_inside_functions():
    violations = [
        f"{name}: {module}" for name in formulas() for level, module in imports(name)
        if level == 0 and module.split(".")[0] in COMFYUI_MODULES
    ]
    assert violations == []


def test_formulas_import_no_node_modules():
    violations = [
        f"{name}: {'.' * level}{module}" for name in formulas() for level, module in imports(name)
        if level and {"nodes", "patching", "files", "extension"} & set(module.split("."))
    ]
    assert violations == []


def rooms() -> set[str]:
    """The methods' folders in nodes/."""
    return {path.parent.name for path in (ROOT / "nodes").glob("*/method.py")}


def test_no_method_imports_another():
    """What two of them need belongs to neither."""
    assert len(rooms()) >= 5
    violations = []
    for name in shipped_modules():
        room = PurePosixPath(name).parts[1] if name.startswith("nodes/") else ""
        others = rooms() - {room}
        if room in rooms():
            violations += [
                f"{name}: {path}" for level, path in imports(name) if level and others & {*path.split(".")}
            ]
    assert violations == []


def test_the_pack_imports_itself_by_relative_imports_only():
    """`nodes` is a module of ComfyUI, and the name `pack` exists only in the tests."""
    violations = [
        f"{name}: {module}" for name in shipped_modules() for level, module in imports(name)
        if level == 0 and module.split(".")[0] in ("pack", "kernels", "workflows", "tests", "nodes")
    ]
    assert violations == []


def called(name: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each call, of a function or of a method."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield node.lineno, node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id


def test_one_module_patches_models():
    violations = [
        f"{name}:{line}: {call}" for name in shipped_modules() if not name.startswith("nodes/patching/")
        for line, call in called(name) if PATCHING_CALLS.fullmatch(call)
    ]
    assert violations == []


def test_one_room_reads_and_writes_weight_files():
    violations = [
        f"{name}:{line}: {call}" for name in shipped_modules() if not name.startswith("nodes/files/")
        for line, call in called(name) if call in FILE_CALLS
    ]
    assert violations == []


@pytest.mark.parametrize("call", [
    "set_model_attn2_patch", "set_model_unet_function_wrapper", "add_patches", "add_object_patch",
    "add_wrapper", "add_wrapper_with_key",
])
def test_the_patching_rule_knows_comfyui_s_calls(call):
    from comfy.model_patcher import ModelPatcher

    assert hasattr(ModelPatcher, call) and PATCHING_CALLS.fullmatch(call)


def test_rooms_have_empty_init_files():
    names = [name for name in shipped_modules() if name.endswith("/__init__.py")]
    assert "nodes/__init__.py" in names
    assert [name for name in names if (ROOT / name).read_text().strip()] == []
    folders = {str(PurePosixPath(name).parent) for name in shipped_modules()} - {"."}
    assert folders == {str(PurePosixPath(name).parent) for name in names}


def breaches(module: ast.Module) -> Iterator[str]:
    """House rules that a syntax tree shows."""
    for node in ast.walk(module):
        if isinstance(node, ast.ExceptHandler):
            kind = ast.unparse(node.type) if node.type else ""
            if kind in ("", "Exception", "BaseException"):
                yield f"line {node.lineno}: except {kind}: name the errors that are expected"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"line {node.lineno}: print: use logging"
        if isinstance(node, ast.Call) and re.fullmatch(
            r"torch\.(set_\w+|manual_seed|use_deterministic_algorithms|autograd\.set_\w+|backends\.\S+)",
            ast.unparse(node.func),
        ):
            yield f"line {node.lineno}: {ast.unparse(node.func)} changes every other node's results"
        if isinstance(node, ast.Assign) and any(
            ast.unparse(target).startswith("torch.backends.") for target in node.targets
        ):
            yield f"line {node.lineno}: a global flag of torch"


@pytest.mark.parametrize("code", [
    "try:\n    f()\nexcept Exception:\n    pass", "try:\n    f()\nexcept:\n    pass", "print(1)",
    "torch.manual_seed(0)", "torch.backends.cudnn.benchmark = True", "torch.set_grad_enabled(False)",
])
def test_house_rules_can_fail(code):
    assert list(breaches(ast.parse(code)))


def test_house_rules():
    violations = [f"{name}, {breach}" for name in shipped_modules() for breach in breaches(tree(name))]
    violations += [f"{name}: over 400 lines" for name in shipped_modules()
              if len((ROOT / name).read_text(encoding="utf-8").splitlines()) > 400]
    assert violations == []
