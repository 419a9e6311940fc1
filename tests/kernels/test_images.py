"""Other versions of Python and of the packages lower the kernels, and compile what is audited."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.test_assembler import LAYER, assembled

ROOT = Path(__file__).parents[2]
PYTHON = "3.12"
IMAGES = {
    # Of a machine with a GPU that cannot install anything.
    "a GPU image": ("jax==0.11.2", "triton==3.6.0", "jax-triton==0.3.1", "0.11.2"),
    # The upper ends of the bounds in pyproject.toml.
    "the newest pins": ("jax<0.12", "triton", "jax-triton<0.4", "<0.12"),
}
"""jax, triton, jax-triton, and the version of the CUDA plugin."""
LOWERED = ("80", "90", "100")
AUDITED = {"a GPU image": ("90",), "the newest pins": ("80", "90")}
"""With Triton 3.6 on sm_80 two entries of the table spill 12 and 32 bytes (kernels/README.md)."""

pytestmark = pytest.mark.slow


def find_python():
    """A Python of that version: on PATH, or among pyenv's. None where there is none."""
    found = [
        shutil.which(f"python{PYTHON}"),
        *Path.home().glob(f".pyenv/versions/{PYTHON}.*/bin/python"),
    ]
    for path in filter(None, found):
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        if f"Python {PYTHON}." in done.stdout:
            return path
    return None


@pytest.fixture(params=IMAGES)
def image(request):
    """The Python of an environment with these packages. It is kept for the next time."""
    python = find_python()
    if python is None:
        pytest.skip(f"no Python {PYTHON} on PATH or among pyenv's")
    jax, triton, jax_triton, plugin = IMAGES[request.param]
    folder = request.config.cache.mkdir(request.param.replace(" ", "-"))
    own = folder / "bin/python"
    done = folder / "installed"
    if not done.exists():
        subprocess.run([python, "-m", "venv", "--clear", folder], check=True)
        pip = [own, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, jax, triton, "absl-py", "jaxtyping", "numpy"], check=True)
        version = plugin if plugin[0] == "<" else f"=={plugin}"
        # Without the plugin's own dependencies, which are gigabytes that nothing here loads.
        alone = ["--no-deps", jax_triton, f"jax-cuda13-plugin{version}"]
        subprocess.run([*pip, *alone], check=True)
        done.touch()
    return own


def environment(**more):
    """Without the interpreter, without a GPU, and with the package from its source."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_", "XLA_"))}
    return {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT / "kernels"), **more}


def test_an_image_lowers_a_layer_and_its_own_assembler_takes_it(image, tmp_path):
    dump = environment(JAX_TRITON_DUMP_DIR=str(tmp_path), TRITON_CACHE_DIR=str(tmp_path / "c"))
    subprocess.run([image, LAYER, *LOWERED], env=dump, check=True)
    tools = "import triton, pathlib; print(pathlib.Path(triton.__file__).parent)"
    package = Path(subprocess.check_output([image, "-c", tools], text=True).strip())
    # Triton's newest: it has one for Blackwell beside the one for the other architectures.
    programs = sorted((package / "backends/nvidia/bin").glob("ptxas*"))
    assert assembled(tmp_path, programs[-1]) == {"sm_80", "sm_90a", "sm_100a"}


def test_an_image_compiles_what_is_audited(image, request, tmp_path):
    architectures = AUDITED[request.node.callspec.params["image"]]
    file = tmp_path / "audit.json"
    command = [image, "-m", "moe_kernels.audit", "--arch", *architectures, "--json", file]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(file.read_text())
    assert {str(row["arch"]) for row in rows} == set(architectures)
