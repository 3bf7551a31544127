"""diagnose() as a whole: it changes nothing, says things in order, and refuses what it cannot look at."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.references import ConvNet, assert_same, snapshot
from torch import nn

import bnkit
from bnkit.diagnosis import CODES, SEVERITIES, Finding, codes_as_markdown, table
from bnkit.diagnosis.rule import rule

DOCUMENT = Path(__file__).parents[2] / "docs" / "diagnosis.md"


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


class Careless(ConvNet):
    """A forward that writes to a parameter and a buffer, draws random numbers, and may fail."""

    def __init__(self):
        super().__init__(dropout=0.5)
        self.register_buffer("counter", torch.zeros(1))
        self.momentum_encoder = nn.Parameter(torch.ones(3), requires_grad=False)
        self.fails_in = ""

    def forward(self, x):
        self.counter = self.counter + 1
        self.momentum_encoder.data.mul_(0.9)
        random.random(), np.random.random()
        if self.fails_in == ("training" if self.bn1.training else "evaluation"):
            raise KeyboardInterrupt
        return super().forward(x)


@pytest.mark.parametrize("mode", ["training", "evaluation"])
@pytest.mark.parametrize("fails_in", ["", "training", "evaluation"])
def test_a_sample_leaves_no_trace_also_after_ctrl_c(mode, fails_in):
    model = Careless().train(mode == "training")
    model.bn2.eval()
    model.fails_in = fails_in
    sample = torch.randn(16, 2, 8, 8)
    kept, before, states = sample.clone(), snapshot(model), random_states()
    if fails_in:
        with pytest.raises(KeyboardInterrupt):
            bnkit.diagnose(model, sample=sample, batch_size=2)
    else:
        assert bnkit.diagnose(model, sample=sample, batch_size=2)
    assert_same(before, snapshot(model))
    assert random_states() == states
    assert torch.equal(sample, kept)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tracing_leaves_nothing_in_what_a_forward_collects():
    class Collecting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.features, self.by_name = [], {}

        def forward(self, x):
            out = self.by_name["out"] = self.bn(self.conv(x))
            self.features.append(out)
            return out

    model = Collecting()
    assert [finding.code for finding in bnkit.diagnose(model, batch_size=32)] == ["BN302"]  # it was traced
    assert (model.features, model.by_name) == ([], {})


def test_two_diagnoses_of_one_model_are_the_same():
    model, sample = ConvNet(dropout=0.5), torch.randn(16, 2, 8, 8)
    assert bnkit.diagnose(model, sample=sample) == bnkit.diagnose(model, sample=sample)


def test_the_worst_comes_first_and_then_by_code():
    model = ConvNet(dropout=0.5)
    model.bn1.momentum, model.bn2.eps = 0.9, 1.0
    model.bn1.running_mean[0] = torch.nan
    findings = bnkit.diagnose(model, batch_size=2, accumulate=2)
    order = [(SEVERITIES.index(finding.severity), finding.code) for finding in findings]
    assert order == sorted(order)
    assert {finding.severity for finding in findings} == set(SEVERITIES)


def test_a_code_can_be_left_out():
    model = ConvNet()
    assert [finding.code for finding in bnkit.diagnose(model, batch_size=2)] == ["BN101", "BN302"]
    assert [finding.code for finding in bnkit.diagnose(model, batch_size=2, ignore=["BN302"])] == ["BN101"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": 2.0}, "batch_size must be"),
        ({"world_size": None}, "world_size must be"),
        ({"accumulate": 0}, "accumulate must be"),
        ({"smallest_batch": -1}, "smallest_batch must be"),
        ({"ignore": ["BN999"]}, "no rule 'BN999'"),
        ({"sample": []}, "no tensor"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bnkit.diagnose(ConvNet(), **options)


def test_what_is_no_optimizer_is_refused():
    with pytest.raises(TypeError, match=re.escape("optimizer is a torch.optim.Optimizer")):
        bnkit.diagnose(ConvNet(), optimizer=[3])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*Lazy modules")
def test_layers_that_cannot_be_seen_are_refused():
    with pytest.raises(TypeError, match="scripted"):
        bnkit.diagnose(torch.jit.script(ConvNet()))
    with pytest.raises(ValueError, match="lazy layer"):
        bnkit.diagnose(nn.LazyBatchNorm2d())


def test_a_batch_is_fed_as_the_user_says():
    model = ConvNet()
    batch = {"pixels": torch.randn(16, 2, 8, 8), "label": torch.zeros(16)}
    with pytest.raises(TypeError, match="forward="):
        bnkit.diagnose(model, sample=batch)
    findings = bnkit.diagnose(model, sample=batch, forward=lambda model, batch: model(batch["pixels"]))
    assert [finding.code for finding in findings] == ["BN302"]


def test_wrappers_are_looked_through():
    model = ConvNet(dropout=0.5)
    plain = bnkit.diagnose(model, batch_size=2)
    assert bnkit.diagnose(torch.compile(model, backend="eager"), batch_size=2) == plain
    assert bnkit.diagnose(nn.DataParallel(model), batch_size=2) == plain


def test_a_model_on_the_meta_device_is_judged_by_what_is_known():
    with torch.device("meta"):
        model = ConvNet()
    model.bn1.momentum = 0.9
    assert [f.code for f in bnkit.diagnose(model, batch_size=2, ignore=["BN302"])] == ["BN101"]


@pytest.mark.gpu
def test_on_cuda_as_on_the_cpu():
    model, sample = ConvNet(dropout=0.5), torch.randn(16, 2, 8, 8)
    codes = [finding.code for finding in bnkit.diagnose(model, sample=sample, batch_size=2)]
    state = torch.cuda.get_rng_state()
    assert [finding.code for finding in bnkit.diagnose(model.cuda(), sample=sample, batch_size=2)] == codes
    assert torch.equal(torch.cuda.get_rng_state(), state)


# --- how it reads


def test_findings_read_well_and_fit_into_json():
    findings = bnkit.diagnose(ConvNet(), batch_size=2)
    text = table(findings)
    for finding in findings:
        assert finding.code in text
        assert "Cure: " in text
        assert str(finding).startswith(f"{finding.code} ({finding.severity}) in bn1, bn2: ")
        assert json.loads(json.dumps(finding.to_dict())) == {
            "code": finding.code,
            "severity": finding.severity,
            "layers": ["bn1", "bn2"],
            "message": finding.message,
            "cure": finding.cure,
        }
    assert text.endswith("1 warning, 1 info")
    assert max(map(len, text.splitlines())) <= 110
    assert table([]) == "Nothing found."


def test_many_layers_are_counted_not_listed():
    finding = Finding("BN101", "warning", tuple(f"layers.{i}" for i in range(50)), "Words.", "More.")
    assert "layers.0, layers.1 and 48 more layers" in table([finding])


def test_messages_are_sentences():
    for code, known in CODES.items():
        for text in (known.cause, known.cure):
            assert text[0].isupper() or text.startswith("bnkit"), code
            assert text.endswith((".", ").")), code


# --- the list of rules


def test_a_code_is_taken_once():
    with pytest.raises(ValueError, match="BN101 is taken"):
        rule("BN101", "info", "another", cause="", cure="")(lambda case: iter(()))


def test_the_document_lists_the_rules_as_they_are():
    assert codes_as_markdown() in DOCUMENT.read_text(encoding="utf-8")


def test_the_documents_example_gives_what_it_shows():
    text = DOCUMENT.read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [shown] = re.findall(r"```text\n(.*?)```", text, re.DOTALL)
    printed: list[str] = []
    exec(code, {"print": lambda *values: printed.append(" ".join(map(str, values)))})
    assert "\n".join(printed) == shown.rstrip("\n")
