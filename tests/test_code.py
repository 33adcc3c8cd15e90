"""The copy of the code that a submitted job runs."""

import shutil
from pathlib import Path

import pytest

from pipeline import code
from pipeline.code import code_digest, code_place, keep_code
from pipeline.errors import LaunchError


@pytest.fixture
def package(monkeypatch, tmp_path):
    """The package that counts as the one that runs."""
    package = tmp_path / "checkout/pipeline"
    for name in ("__init__.py", "jobs/batch.py", "__pycache__/batch.pyc", "conf/job/tiny.yaml"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    monkeypatch.setattr(code, "PACKAGE", package)
    return package


def files(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_the_code_is_kept_under_its_hash(package, tmp_path):
    kept = code_place(tmp_path / "root")
    keep_code(kept)
    assert kept == tmp_path / "root/code" / code_digest(package)
    assert files(kept) == ["pipeline/__init__.py", "pipeline/jobs/batch.py"]
    assert code_digest(kept / "pipeline") == kept.name
    assert list(kept.parent.iterdir()) == [kept]


def test_code_that_is_edited_before_it_is_kept_is_refused(package, tmp_path):
    kept = code_place(tmp_path / "root")
    (package / "jobs/batch.py").write_text("edited")
    with pytest.raises(LaunchError) as caught:
        keep_code(kept)
    assert str(caught.value) == (
        f"{kept}: the code of this job cannot be kept there, {package} was edited meanwhile; start the job again: "
        "python -m pipeline job=NAME"
    )
    assert list(kept.parent.iterdir()) == []


def test_two_submissions_may_keep_the_code_at_the_same_time(monkeypatch, package, tmp_path):
    kept = code_place(tmp_path / "root")

    def copy(*words, **how):
        monkeypatch.undo()
        monkeypatch.setattr(code, "PACKAGE", package)
        keep_code(kept)
        return shutil.copytree(*words, **how)

    monkeypatch.setattr(code.shutil, "copytree", copy)
    keep_code(kept)
    assert list(kept.parent.iterdir()) == [kept]
    assert code_digest(kept / "pipeline") == kept.name
