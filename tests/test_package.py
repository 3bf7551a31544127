"""The package as a whole."""

import subprocess
import sys

import pytest

import bnkit
import bnkit.callbacks
import bnkit.norms


def test_importing_bnkit_imports_torch_alone():
    code = (
        "import sys, bnkit, bnkit.norms; "
        "print([m for m in ('lightning', 'hydra', 'wandb', 'omegaconf', 'torch._dynamo') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", [bnkit, bnkit.callbacks, bnkit.norms])
def test_every_public_name_exists_and_is_documented(module):
    for name in module.__all__:
        assert getattr(module, name).__doc__, name
