"""Fail unless dist/ has one wheel and one sdist that hold all of the package, and nothing else."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = {"__pycache__"}
#: What an sdist has beside the package, and what the build writes there.
BESIDE = {"CITATION.cff", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
BUILT = {"PKG-INFO", "setup.cfg"}


def package() -> set[str]:
    """Return the files of the package, as paths from the root."""
    found = (p.relative_to(ROOT) for p in (ROOT / "vitxr").rglob("*") if p.is_file())
    return {p.as_posix() for p in found if not LEFT_OUT & set(p.parts)}


def main() -> int:
    """Compare; print what differs."""
    sys.path.insert(0, str(ROOT))
    from vitxr._version import __version__

    (wheel,) = (ROOT / "dist").glob("*.whl")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(sdist) as archive:
        names = [m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()]
    in_sdist = set(names)
    about = f"vitxr-{__version__}.dist-info"
    wrong = [f"{wheel.name} lacks {p}" for p in sorted(package() - in_wheel)]
    wrong += [f"{sdist.name} lacks {p}" for p in sorted(package() - in_sdist)]
    wrong += [
        f"{wheel.name} has {p}"
        for p in sorted(in_wheel - package())
        if not p.startswith(f"{about}/")
    ]
    wrong += [f"{sdist.name} lacks {p}" for p in sorted(BESIDE - in_sdist)]
    wrong += [
        f"{sdist.name} has {p}"
        for p in sorted(in_sdist - package() - BESIDE - BUILT)
        if not p.startswith("vitxr.egg-info/")
    ]
    for part in ("METADATA", "entry_points.txt", "licenses/LICENSE"):
        if f"{about}/{part}" not in in_wheel:
            wrong.append(f"{wheel.name} lacks {about}/{part}")
    print("\n".join(wrong) or f"{wheel.name}, {sdist.name}: {len(package())} files of the package")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
