"""What the documents show works, and what they point to is there."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.neck = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.neck(self.backbone(x))


@pytest.mark.filterwarnings("ignore:.*GPU available")
def test_the_readmes_python_runs_as_it_stands():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    names = {"model": Model(), "train_loader": DataLoader(TensorDataset(torch.randn(64, 1, 8, 8)), 32)}
    for block in blocks:
        exec(block, names)
    assert names["report"].samples == 64
    assert type(names["model"].neck) is nn.BatchNorm2d, "reverted by the last line"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    missing = [link for link in links if not link.startswith("http") and not (document.parent / link).exists()]
    assert not missing


def test_the_two_commands_are_on_the_first_screen():
    screen = "\n".join((ROOT / "README.md").read_text().splitlines()[:24])
    assert "pip install -c constraints.txt -e . && python scripts/train.py\n" in screen
    assert 'pip install -c constraints.txt -e ".[dev]" && pytest\n' in screen
