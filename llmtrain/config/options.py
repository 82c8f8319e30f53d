"""The options that people choose, `conf/<group>/<option>.yaml`: names and first lines only: `--help` is quick."""

from collections.abc import Sequence
from pathlib import Path


def conf_directory() -> Path:
    """`conf/` inside the package where it is installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "conf"
    return installed if installed.is_dir() else package.parent / "conf"


def options(directories: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """The file of each option of each group, both in alphabetical order.

    Files whose name starts with `_` are left out: options inherit them, nobody chooses them. Where two directories have
    an option of the same name, the first counts, as in Hydra.
    """
    found: dict[str, dict[str, Path]] = {}
    for directory in directories:
        for path in sorted(directory.glob("*/*.yaml")):
            if not path.name.startswith(("_", ".")):
                found.setdefault(path.parent.name, {}).setdefault(path.stem, path)
    return {group: dict(sorted(found[group].items())) for group in sorted(found)}


def description(path: Path) -> str:
    """The first comment line of an option's file that is neither Hydra's `# @package` nor a command."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith(("# @", "# python ")):
            return line.lstrip("# ").rstrip(" :")
    return ""
