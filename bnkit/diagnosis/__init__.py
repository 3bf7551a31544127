"""What is wrong with a model's BatchNorm: findings, each with its cause and its cure.

One rule a code, one family of rules a file: ``batch.py`` (BN1xx), ``statistics.py`` (BN20x), ``averaging.py``
(BN21x), ``network.py`` (BN3xx), ``optimizer.py`` (BN4xx) and ``measured.py`` (BN5xx). A new rule is a function there
that is given a ``bnkit.diagnosis.case.Case`` and yields a ``bnkit.diagnosis.rule.Found``, under the
decorator that says its code, severity, cause and cure; it needs a test that it fires, one that it does not fire on a
healthy model, and its line in docs/diagnosis.md, which ``codes_as_markdown()`` gives.
"""

from bnkit.diagnosis import averaging, batch, measured, network, optimizer, statistics  # noqa: F401  (they fill CODES)
from bnkit.diagnosis.examine import diagnose
from bnkit.diagnosis.finding import SEVERITIES, Finding, Severity, table
from bnkit.diagnosis.rule import CODES, Rule

__all__ = ["CODES", "SEVERITIES", "Finding", "Rule", "Severity", "codes_as_markdown", "diagnose", "table"]


def codes_as_markdown() -> str:
    """Every code with its severity, cause and cure, as the table in the documents."""
    lines = ["| code | severity | what | why it matters | cure | needs |", "|---|---|---|---|---|---|"]
    for code, rule in sorted(CODES.items()):
        needs = f"`{rule.needs}`" if rule.needs else ""
        lines.append(f"| {code} | {rule.severity} | {rule.title} | {rule.cause} | {rule.cure} | {needs} |")
    return "\n".join(lines)
