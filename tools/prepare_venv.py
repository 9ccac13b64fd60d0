"""Makes a virtual environment ready to train, to develop or to build the site of docs/.

    python3 tools/prepare_venv.py FOLDER train|dev|docs

Needs only Python. A torch that this Python imports is used; otherwise the one that constraints.txt names is installed.
Nothing is fetched that is already there, so that without network it works wherever everything needed is importable.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import site
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_backend import environment  # noqa: E402

# Libraries beside those of the extras (torchvision for both, the others for "dev"), each with what importing it needs
# besides torch and the extra. They are installed as they stand here, in the versions of constraints.txt, since some
# would bring a torch along.
PEERS = {
    "torchvision": (),
    "timm": (),
    "monai": (),
    "torchxrayvision": (
        *("imageio", "pandas", "python-dateutil", "scikit-image", "lazy-loader", "tifffile"),
        *("requests", "urllib3", "idna", "certifi"),
    ),
    "pytorch-lightning": ("lightning-utilities", "torchmetrics", "fsspec", "pyyaml"),
    "safetensors": (),
    "onnxscript": ("onnx", "onnx-ir", "ml-dtypes", "protobuf"),
    # what people run on their networks (tests/peers)
    "accelerate": ("psutil", "pyyaml", "huggingface-hub"),
    "captum": (),
    "grad-cam": ("ttach",),  # OpenCV, 150 MB for scaling a picture, the tests replace
    "higher": (),
    "opacus": ("opt-einsum",),
    "ptflops": (),
    "pytorchcv": (),
    "segmentation-models-pytorch": ("huggingface-hub", "fsspec", "pyyaml", "requests"),
    "torchinfo": (),
    # programs that print the GPU kernels' machine code (tests/cuda), 6 MB; toolkits for building have none
    "nvidia-cuda-cuobjdump": ("nvidia-cuda-nvdisasm",),
}


def usable_torch(python: str) -> bool:
    """Whether `python` imports a torch that is new enough; silently, whatever the reason if not."""
    code = "import torch; print(torch.__version__)"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True)
    version = re.findall(r"\d+", run.stdout.strip().splitlines()[-1])[:2] if run.returncode == 0 else []
    return tuple(map(int, version)) >= environment.MINIMUM_TORCH


def unfinished(folder: Path) -> Path:
    """The file that stands beside an environment while it is being made, so that one cut short is made again."""
    return folder.with_name(f"{folder.name}.unfinished")


def create(folder: Path) -> None:
    """A new environment at `folder`, which sees this Python's packages if a usable torch is among them."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished(folder).touch()
    shared = usable_torch(sys.executable)
    print(f"new environment {folder}" + (f", with the torch of {sys.executable}" if shared else ""), flush=True)
    # a shared pip will do, and some Pythons have no ensurepip to make another
    with_pip = not (shared and importlib.util.find_spec("pip"))
    venv.create(folder, with_pip=with_pip, system_site_packages=shared, symlinks=True, clear=True)
    if shared and not usable_torch(str(folder / "bin" / "python")):
        # This Python is in a virtual environment itself, and "system" means the one below it.
        packages = next((folder / "lib").glob("python*")) / "site-packages"
        (packages / "shared_packages.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    unfinished(folder).unlink()


def pip(*arguments: str) -> bool:
    sys.stdout.flush()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT).returncode == 0


def pinned() -> dict[str, str]:
    """The versions in constraints.txt."""
    return dict(re.findall(r"^([\w-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))


def wanted(extra: str) -> dict[str, str]:
    """The distributions of an extra of pyproject.toml, with their versions in constraints.txt ("" for any)."""
    pins = pinned()
    names = re.search(rf"^{extra} = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert names is not None, f"pyproject.toml has no extra {extra}"
    return {name: pins.get(name, "") for name in [*re.findall(r'"([\w-]+)"', names[1]), "ninja"]}


def installed(name: str) -> str | None:
    if name == "ninja" and environment.find_ninja():
        return "present"
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def install(extra: str) -> None:
    """Brings what is missing into the environment that runs this, torch first and the package itself last."""
    if extra == "docs":  # the pages are made of the package's text: it need not be built
        install_extra(wanted(extra))
        return
    if not usable_torch(sys.executable):
        torch = f"torch=={pinned()['torch']}"
        print(f"installing {torch}")
        if not pip(torch):
            raise SystemExit(f"{torch} could not be installed; see pip's message above.")
    install_extra(wanted(extra))
    install_peers(PEERS if extra == "dev" else ["torchvision"])
    if extra == "dev":
        install_extra(wanted("docs"), optional=True)
        for command in ("ruff", "clang-format"):
            link_command(command)
    print("building densenet_ext")
    if not pip("--no-deps", "--editable", "."):
        raise SystemExit("densenet_ext could not be built; see the message above.")


def install_extra(pins: dict[str, str], optional: bool = False) -> None:
    """Installs what is missing of an extra; one that is not optional ends the program where it cannot be had."""
    missing = {name: pin for name, pin in pins.items() if installed(name) is None or (pin and installed(name) != pin)}
    if not missing:
        return
    requirements = [f"{name}=={pin}" if pin else name for name, pin in missing.items()]
    print("installing " + ", ".join(requirements))
    if pip(*requirements):
        return
    absent = [name for name in missing if installed(name) is None]
    if absent and not optional:
        raise SystemExit(f"could not be installed, see pip's message above: {', '.join(absent)}")
    print("not installed; going on with what is there: " + ", ".join(f"{n} {installed(n)}" for n in missing))


def install_peers(libraries: Iterable[str]) -> None:
    """Optional: the tests that need one of `libraries` skip themselves without it, and training says what it needs."""
    pins = {**pinned(), "torchvision": torchvision_release(environment.torch_version() or "")}
    for library in libraries:
        missing = [name for name in (library, *PEERS[library]) if installed(name) is None]
        if missing and not pip("--no-deps", *(f"{name}=={pins[name]}" for name in missing)):
            print(f"{library} could not be installed: going on without it")


def torchvision_release(torch: str) -> str:
    """The torchvision that belongs to a release of torch: 0.28.0 to 2.13.0, and so on in step up to 2.14.

    From 0.29.1 on torchvision is built for every later torch (its metadata say torch >= 2.14.0).
    """
    minor, patch = (int(part) for part in re.findall(r"\d+", torch)[1:3])
    return f"0.{minor + 15}.{patch}" if minor <= 14 else "0.29.2"


def link_command(name: str) -> None:
    """Makes a program of a shared package callable: it lies beside the Python that it was installed with."""
    if shutil.which(name):
        return
    for file in importlib.metadata.files(name) or []:
        if file.name == name and os.access(path := file.locate(), os.X_OK):
            (Path(sys.prefix) / "bin" / name).symlink_to(Path(path).resolve())
            return


def main() -> None:
    folder, extra = Path(sys.argv[1]).absolute(), sys.argv[2]
    python = folder / "bin" / "python"
    if Path(sys.prefix).resolve() == folder.resolve():
        install(extra)
        return
    if not python.exists() or unfinished(folder).exists():
        create(folder)
    os.execv(python, [str(python), __file__, str(folder), extra])


if __name__ == "__main__":
    main()
