"""House rules of conf/ and of the schemas behind it."""

from pathlib import Path

import pytest
import yaml
from yaml.nodes import MappingNode, Node

from llmtrain.config.base import Changes
from llmtrain.config.options import conf_directory
from llmtrain.config.schema import Setting, settings, variants

CONF = conf_directory()
FILES = sorted(CONF.rglob("*.yaml"))
SETTINGS = list(settings())


def entries(node: Node, prefix: str = "") -> list[tuple[str, int]]:
    """Key and line of every entry."""
    found = []
    for name, value in node.value if isinstance(node, MappingNode) else []:
        found += [(prefix + name.value, name.start_mark.line), *entries(value, f"{prefix}{name.value}.")]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(CONF))


def dotted(setting: Setting) -> str:
    return ".".join([*setting.key, *setting.kinds.values()])


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_file_sets_each_key_once(path: Path):
    keys = [key for key, _ in entries(yaml.compose(path.read_text()))]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("path", [path for path in FILES if path.name.startswith("_")], ids=name_of)
def test_each_key_that_options_inherit_has_a_comment_on_its_line(path: Path):
    lines = path.read_text().splitlines()
    bare = [
        key for key, line in entries(yaml.compose(path.read_text())) if key != "defaults" and "#" not in lines[line]
    ]
    assert bare == []


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_names_code_to_run(path: Path):
    assert "_target_" not in path.read_text()


@pytest.mark.parametrize("setting", SETTINGS, ids=dotted)
def test_setting_says_what_it_means_and_what_it_changes(setting: Setting):
    if groups := variants(setting.field):
        assert all(group.__doc__ for group in groups.values())
        return
    changes = [item for item in setting.field.metadata if isinstance(item, Changes)]
    assert len(changes) == 1, "`Changes` stands in the outermost annotation, where fields_that_change looks"
    assert setting.field.description or setting.key[-1] == "kind", "a docstring under the field"


@pytest.mark.parametrize("setting", SETTINGS, ids=dotted)
def test_setting_has_no_default_in_python(setting: Setting):
    assert setting.field.is_required(), "YAML owns values"
