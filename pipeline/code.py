"""The code that a submitted job runs: a copy in `<root>/code/<hash>`, which no edit of the checkout reaches.

Asks for nothing but Python's own library, for `pipeline.probe`.
"""

import hashlib
import shutil
import uuid
from pathlib import Path

from pipeline.errors import LaunchError

PACKAGE = Path(__file__).resolve().parent
NOT_CODE = ("__pycache__", "conf", "slurm")


def code_digest(package: Path) -> str:
    """Return a hash of the code of this package as it lies in a directory."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.*")):
        if path.is_file() and not {*NOT_CODE} & set(path.relative_to(package).parts):
            digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def code_place(root: Path) -> Path:
    """Return where the code that runs now is kept for jobs of this root: `<root>/code/<hash>`."""
    return (root / "code" / code_digest(PACKAGE)).absolute()


def keep_code(kept: Path) -> None:
    """Copy the code that runs now to its `code_place`.

    Raises:
        LaunchError: If it is not the code of which the place has its name.
    """
    temporary = kept.with_name(f"{kept.name}.{uuid.uuid4().hex}.tmp")
    try:
        shutil.copytree(PACKAGE, temporary / PACKAGE.name, ignore=shutil.ignore_patterns(*NOT_CODE))
        if code_digest(temporary / PACKAGE.name) != kept.name:
            raise LaunchError(
                f"{kept}: the code of this job cannot be kept there, {PACKAGE} was edited meanwhile; start the job "
                "again: python -m pipeline job=NAME"
            )
        try:
            temporary.rename(kept)
        except OSError:
            if not kept.exists():  # no other submission was faster
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
