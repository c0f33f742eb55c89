"""Help pages, translations and the settings say exactly what the nodes are."""

import json
import re
import sys
import urllib.request

import pytest

if sys.version_info >= (3, 11):
    pass
else:
    pass

from launcher.scripts import ROOT
from launcher.server import PACK_NAME
from pack.nodes.extension import METHOD_NODES, THEATRE_NODES
from pack.nodes.patching import samplers
from pack.nodes.puppets import config

NODES = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in METHOD_NODES + THEATRE_NODES}
DOCS = ROOT / "web" / "docs"
# Languages without a page of their own show the English one.
PAGES = {"en": "{}.md", "ja": "{}/ja.md", "zh": "{}/zh.md"}
TRANSLATIONS = ("ja", "zh")
HEADINGS = {"en": ("Inputs", "Outputs"), "ja": ("入力", "出力"), "zh": ("输入", "输出")}
UNIT = {"en": "Unit: ", "ja": "単位：", "zh": "单位："}
EMPTY = {"en": "empty", "ja": "空欄", "zh": "空"}
# vue-i18n gives these a meaning in every text but tooltips, which the frontend shows as they are.
I18N_SYNTAX = set("{}@|")
EVERY_PAGE = pytest.mark.parametrize(("node_id", "language"), [(i, lang) for i in NODES for lang in PAGES])


def locale(language: str, file: str) -> dict:
    return json.loads((ROOT / "locales" / language / f"{file}.json").read_text(encoding="utf-8"))


def page(node_id: str, language: str) -> str:
    """Without soft hyphens, by which long names break in ComfyUI's help panel."""
    return (DOCS / PAGES[language].format(node_id)).read_text(encoding="utf-8").replace("\u00ad", "")


def section(text: str, heading: str) -> str:
    """The text below `## heading`, up to the next one."""
    return re.split(r"^## ", text.split(f"\n## {heading}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def items(text: str, language: str) -> list[tuple[str, str, str]]:
    """("label `name`", "1", text) of each "- label `name` (default 1): text": a table would not fit the panel."""
    opening, word, closing, colon = {
        "en": (" \\(", "default ", "\\): ", ": "),
        "ja": ("（", "既定値 ", "）：", "："),
        "zh": ("（", "默认 ", "）：", "："),
    }[language]
    assert not re.search(r"^\|", text, re.MULTILINE)
    text = text.split("\n### ")[0]
    pattern = f"^- ([^*]+?)(?:{opening}(?:{word})?(.+?){closing}|{colon})(.+)$"
    return [(name, value or "", effect) for name, value, effect in re.findall(pattern, text, re.MULTILINE)]


def labelled(cell: str) -> tuple[str, str]:
    """("label", "name") of "label `name`"; the label may be empty, and a bare word is a name."""
    match = re.fullmatch(r"(?:([^`]+) )?`(\w+)`", cell)
    return (match[1] or "", match[2]) if match else ("", cell)


def named_values(node_id: str, widget) -> tuple[str, ...]:
    """The words that a text about this input must contain, in every language."""
    if widget.id in ("actions", "scenes"):
        return config.ACTIONS if widget.id == "actions" else config.SCENES
    options = tuple(getattr(widget, "options", None) or ())
    if widget.id == "apply_to":
        return (*options, "ddim", *samplers.STEPWISE_SAMPLERS)
    return options if len(options) < 6 else ()


def output_name(output) -> str:
    return output.display_name or output.io_type


@pytest.mark.parametrize("node_id", NODES)
def test_schemas_explain_themselves(node_id):
    schema = NODES[node_id]
    assert node_id.startswith("Understudy") and schema.category.split("/")[0] == "Understudy"
    assert schema.display_name and schema.description and schema.search_aliases
    assert [slot.id for slot in (*schema.inputs, *schema.outputs) if not slot.tooltip] == []


@EVERY_PAGE
def test_help_names_every_input_with_its_default(node_id, language):
    widgets = NODES[node_id].inputs
    table = items(section(page(node_id, language), HEADINGS[language][0]), language)
    assert [labelled(row[0])[1] for row in table] == [widget.id for widget in widgets]
    for row, widget in zip(table, widgets, strict=True):
        # A socket may have a default of ComfyUI's, which nobody sees.
        default = None if getattr(widget, "force_input", None) else getattr(widget, "default", None)
        if isinstance(default, float):
            assert float(row[1]) == default and UNIT[language] in row[2], widget.id
        else:
            texts = {None: "", "": EMPTY[language], False: "false", True: "true"}
            shown = row[1].strip("`")  # words in angle brackets are code, lest they be taken for HTML
            assert shown == (texts[default] if default in ("", None) or isinstance(default, bool) else str(default))
        if widget.id not in ("actions", "scenes"):  # their words are below the table
            assert [word for word in named_values(node_id, widget) if word not in row[2]] == []


@EVERY_PAGE
def test_help_names_every_output(node_id, language):
    table = items(section(page(node_id, language), HEADINGS[language][1]), language)
    outputs = NODES[node_id].outputs
    assert [labelled(row[0])[1] for row in table] == [output_name(output) for output in outputs]
    assert all(output.io_type in (row[1] or row[0]) for row, output in zip(table, outputs, strict=True))


@EVERY_PAGE
def test_help_has_every_part(node_id, language):
    text = page(node_id, language)
    assert text.startswith("# ") and text.count("\n# ") == 0
    assert len(re.findall("^## ", text, re.MULTILINE)) == 6 and "```" not in text, "a diagram is wider than the panel"
    assert labels(node_id, language)[0] in text.splitlines()[0]
    assert "GPL-3.0-or-later" in text.rsplit("\n## ", 1)[1]


def labels(node_id: str, language: str) -> tuple[str, dict]:
    """The name that a node shows, and the locale's entry; English is the schema's own text and has no entry."""
    if language == "en":
        return NODES[node_id].display_name, {}
    texts = locale(language, "nodeDefs")[node_id]
    return texts["display_name"], texts


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node_id", NODES)
def test_translated_help_uses_the_labels_that_the_node_shows(node_id, language):
    texts = labels(node_id, language)[1]
    inputs, outputs = (items(section(page(node_id, language), part), language) for part in HEADINGS[language])
    for cell, name in (labelled(row[0]) for row in inputs):
        assert cell == texts["inputs"][name]["name"]
    for index, row in enumerate(outputs):
        assert labelled(row[0])[0] == texts["outputs"][str(index)].get("name", "")


@pytest.mark.parametrize("language", PAGES)
def test_help_teaches_the_theatre_s_words(language):
    words = {
        "UnderstudyPuppet": (
            *config.SPECIES, *config.COLOURS, *config.PATTERNS, *config.HEADWEAR[1:], *config.SCENES,
        ),
        "UnderstudyPuppetSet": (*config.ACTIONS, *config.SCENES),
    }
    for node_id, needed in words.items():
        assert [word for word in needed if word not in page(node_id, language)] == []


@pytest.mark.parametrize("language", PAGES)
def test_the_theatre_s_words_are_in_the_tooltip_where_they_are_typed(language):
    words = (*config.SPECIES, *config.PATTERNS, *config.HEADWEAR[1:], *config.COLOURS)
    for node_id, name in (("UnderstudyPuppet", "identity"), ("UnderstudyPuppetSet", "identities")):
        (widget,) = (widget for widget in NODES[node_id].inputs if widget.id == name)
        tooltip = widget.tooltip if language == "en" else labels(node_id, language)[1]["inputs"][name]["tooltip"]
        assert [word for word in words if word not in tooltip] == []


@pytest.mark.parametrize("word", [
    "顔", "人脸", "人形", "木偶", "姿态", "ポーズ", "动作", "動作", "swap", "motion", "face", "puppet", "pose",
])
def test_a_search_in_three_languages_finds_a_node(word):
    """The search finds names in the language of the menus, and aliases in each."""
    assert [node_id for node_id, schema in NODES.items() if any(word in alias for alias in schema.search_aliases)]


def test_every_node_is_found_by_a_word_of_japanese_or_chinese():
    """Whatever the language of the menus, in which its name is shown."""
    east_asian = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
    found = {node_id for node_id, schema in NODES.items() if any(map(east_asian.search, schema.search_aliases))}
    assert NODES.keys() - found == set()


def test_there_is_a_help_page_for_each_node_and_no_other():
    expected = {form.format(node_id) for node_id in NODES for form in PAGES.values()}
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.*")} == expected


def shown_inputs(schema) -> list[str]:
    """The ids of a node's inputs and of the widget that the frontend adds below a seed."""
    ids = []
    for widget in schema.inputs:
        ids += [widget.id] + ["control_after_generate"] * bool(getattr(widget, "control_after_generate", None))
    return ids


@pytest.mark.parametrize("language", TRANSLATIONS)
def test_locales_cover_each_node_exactly(language):
    texts = locale(language, "nodeDefs")
    assert list(texts) == list(NODES)
    for node_id, schema in NODES.items():
        assert list(texts[node_id]) == ["display_name", "description", "inputs", "outputs"]
        assert list(texts[node_id]["inputs"]) == shown_inputs(schema)
        assert list(texts[node_id]["outputs"]) == [str(i) for i in range(len(schema.outputs))]
        for name, text in texts[node_id]["inputs"].items():
            assert list(text) == ["name", "tooltip"][: 1 if name == "control_after_generate" else 2], (node_id, name)
        for text, output in zip(texts[node_id]["outputs"].values(), schema.outputs, strict=True):
            assert list(text) == (["name", "tooltip"] if output.display_name else ["tooltip"])
    compiled = [
        text for entry in texts.values() for text in (
            entry["display_name"], entry["description"],
            *(slot.get("name", "") for slot in (*entry["inputs"].values(), *entry["outputs"].values())),
        )
    ]
    assert [text for text in compiled if I18N_SYNTAX & set(text)] == []


def test_english_texts_are_plain_in_the_schema():
    """The frontend shows the schema's names and tooltips where a language has no `nodeDefs.json`: English has none.

    Compared once in frontend 1.47.12, classic nodes and Nodes 2.0: names, labels, tooltips, outputs and
    control_after_generate were the same with a file of the schema's texts and without it, in English and Japanese.
    """
    assert not (ROOT / "locales" / "en" / "nodeDefs.json").exists()
    texts = [
        text for schema in NODES.values() for text in (
            schema.display_name, schema.description, *(output.display_name or "" for output in schema.outputs)
        )
    ]
    assert [text for text in texts if I18N_SYNTAX & set(text)] == []


@pytest.mark.parametrize("language", TRANSLATIONS)
@pytest.mark.parametrize("node_id", NODES)
def test_translations_are_translated_and_keep_the_values_to_type(node_id, language):
    script = re.compile("[\u3040-\u30ff]" if language == "ja" else "[\u4e00-\u9fff]")
    text = labels(node_id, language)[1]
    slots = (*text["inputs"].values(), *text["outputs"].values())
    tooltips = [slot["tooltip"] for slot in slots if "tooltip" in slot]
    assert [line for line in (text["display_name"], text["description"], *tooltips) if not script.search(line)] == []
    for widget in NODES[node_id].inputs:
        words = re.findall(r"(?<!\w)'([^']+)'", widget.tooltip)
        words += [word for word in named_values(node_id, widget) if word in widget.tooltip]
        assert [word for word in words if word not in text["inputs"][widget.id]["tooltip"]] == []


@pytest.mark.parametrize("language", PAGES)
def test_locales_cover_categories_and_the_settings(language):
    assert {path.stem for path in (ROOT / "locales" / language).iterdir()} == (
        {"main", "settings"} | ({"nodeDefs"} if language in TRANSLATIONS else set())
    )
    script = (ROOT / "web" / "understudy.js").read_text(encoding="utf-8")
    settings = re.findall(r'id: "([\w.]+)"', script)
    groups = {part for category in re.findall(r"category: (\[.*\])", script) for part in json.loads(category)[:-1]}
    parts = {part for schema in NODES.values() for part in schema.category.split("/")}
    main = locale(language, "main")
    assert set(main["nodeCategories"]) == parts and set(main["settingsCategories"]) == groups
    texts = locale(language, "settings")
    assert len(settings) == 2 and list(texts) == [setting.replace(".", "_") for setting in settings]
    if language == "en":
        plain = re.sub(r'"\s*\+\s*"', "", script)
        assert all(f'"{text}"' in plain for entry in texts.values() for text in entry.values())
    readers = "".join((ROOT / "nodes" / name).read_text() for name in ("puppets/menus.py", "consent/gate.py"))
    assert [setting for setting in settings if f'"{setting}"' not in readers] == []


def test_there_are_three_languages():
    assert {path.name for path in (ROOT / "locales").iterdir()} == set(PAGES)


def test_comfyui_serves_script_help_and_translations(server):
    assert f"/extensions/{PACK_NAME}/understudy.js" in server.get("/extensions")
    translations = server.get("/i18n")
    for language in PAGES:
        served = translations[language]
        assert served.get("nodeDefs", {}) == (locale(language, "nodeDefs") if language in TRANSLATIONS else {})
        assert served["settings"] == locale(language, "settings")
        assert served["nodeCategories"] == locale(language, "main")["nodeCategories"]
    for node_id in NODES:
        for language, form in PAGES.items():
            with urllib.request.urlopen(f"{server.url}/extensions/{PACK_NAME}/docs/{form.format(node_id)}") as answer:
                assert answer.headers.get_content_type() != "text/html"  # the frontend takes HTML for "no help"
                assert answer.read() == (DOCS / form.format(node_id)).read_bytes()
