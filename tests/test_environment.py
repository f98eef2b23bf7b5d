"""Versions are written in one place, and what repeats them agrees."""

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def pins(text: str) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return dict(line.split("==") for line in lines if "==" in line)


def test_conda_environments_name_the_pinned_versions():
    wanted = pins((ROOT / "requirements.txt").read_text())
    files = sorted((ROOT / "envs").glob("*.yaml"))
    assert files
    for file in files:
        listed = yaml.safe_load(file.read_text())["dependencies"]
        (packages,) = [d["pip"] for d in listed if isinstance(d, dict)]
        given = dict(p.split("==") for p in packages)
        assert given == {name: wanted[name] for name in given}, file.name
        assert set(wanted) - set(given) == {"snakemake", "snakemake-executor-plugin-slurm"}, file.name


def test_every_requirement_is_pinned_exactly():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text().splitlines():
            line = line.split("#")[0].strip()
            assert not line or line.startswith("-r ") or "==" in line, f"{name}: {line}"


def test_imports_point_one_way():
    """Library modules know neither scripts nor rules, scripts know no rules, and neither knows Snakemake."""
    for folder, forbidden in (
        ("wmdd_core", ("workflow_scripts", "rules", "snakemake", "yaml")),
        ("workflow_scripts", ("rules", "snakemake")),
    ):
        for path in (ROOT / folder).glob("*.py"):
            for line in path.read_text().splitlines():
                words = line.split()
                if words[:1] in (["import"], ["from"]):
                    assert words[1].split(".")[0] not in forbidden, f"{path}: {line}"
