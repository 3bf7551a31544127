"""The W&B workspace: panels for what bnkit logs, created with one command, or written to a JSON file offline.

wandb-workspaces is imported only by what uses it, as it is an extra.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

from bnkit.dashboard.history import RunHistory
from bnkit.dashboard.keys import LAYER_KEYS, MODEL_KEYS, ModelKey, Section, short_names
from bnkit.dashboard.wandb_run import HEATMAP, STEP, TABLE, prefixed

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

__all__ = ["build", "create", "logged_keys", "make", "to_json"]

_LINES = 100
"""Layers that a panel names at most; of more, only the worst are logged, which change: there it has a pattern."""

_TABLES: dict[str, tuple[Section, str]] = {
    "alarms": ("BN health", "Alarms"),
    "layers": ("Where", "All layers, all measures"),
    "recalibrations": ("Why", "Recalibrations"),
    "channels": ("Why", "Channels at the last recalibration"),
    "swaps": ("Why", "Swaps"),
}


class _Plot(NamedTuple):
    """A line plot: its lines by name, or by a pattern."""

    title: str
    unit: str
    meaning: str
    keys: tuple[str, ...]
    pattern: str | None = None


def make(
    *,
    entity: str | None = None,
    project: str = "bnkit",
    name: str = "bnkit",
    run: str | Path | None = None,
    prefix: str = "",
    output: str | Path | None = None,
) -> str:
    """Create the workspace at W&B, or write it to a file.

    Args:
        entity: user or team that owns the project; None: the one of the W&B key.
        project: that has the runs.
        name: of the workspace.
        run: a run as ``bnkit.dashboard.sources.read`` takes it; its layers get a line each, and what it did not log
            gets no panel. None: panels for all that there is, those of the layers by a pattern.
        prefix: of the ``WandbLogger``; a ``run`` brings its own.
        output: a file to write, without key or network; None: create it at W&B.

    Returns:
        The URL of the workspace; with ``output``, the path of the file.

    Raises:
        ModuleNotFoundError: When wandb-workspaces is not installed.
        FileNotFoundError: When there is no such ``run``, or no such folder to write to.
        ValueError: When there is no W&B key, or the run has nothing of bnkit in it.
        RuntimeError: When W&B refuses the workspace.
    """
    _require_wandb_workspaces()
    layers: list[str] | None = None
    keys: set[str] | None = None
    if run is not None:
        from bnkit.dashboard.sources import read

        history = read(run)
        prefix = history.info.get("prefix", prefix)
        keys = logged_keys(history)
        if not keys:
            raise ValueError(
                f"run={run} has no key of bnkit, so that no panel would show anything: train with the callback "
                f"ActivationShiftMonitor, or leave run=... out for panels of all that it can log."
            )
        layers = list(history.names.values()) or list(
            dict.fromkeys(layer for measure in LAYER_KEYS for layer in history.layers(measure.prefix))
        )
    if output is not None:
        path = Path(output)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"output={output}: there is no folder {path.parent}; make it first.")
        workspace = build(entity or "", project, layers, name, keys=keys, prefix=prefix)
        path.write_text(to_json(workspace), encoding="utf-8")
        return str(path)
    if entity is None:
        _require_key()
        import wandb

        entity = str(wandb.Api().default_entity or "")
    return create(build(entity, project, layers, name, keys=keys, prefix=prefix))


def build(
    entity: str,
    project: str,
    layers: Iterable[str] | None = None,
    name: str = "bnkit",
    *,
    keys: Collection[str] | None = None,
    prefix: str = "",
) -> Workspace:
    """Build the workspace, without key or network.

    Args:
        entity: user or team that owns the project.
        project: that has the runs.
        layers: names of all layers, in the model's order, for a line each; None, or more than 100: lines by a pattern.
        name: of the workspace.
        keys: what was logged, without prefix; the rest gets no panel. None: all that there is.
        prefix: of the ``WandbLogger``.

    Raises:
        ModuleNotFoundError: When wandb-workspaces is not installed.
    """
    _require_wandb_workspaces()
    import wandb_workspaces.reports.v2.interface as wr
    import wandb_workspaces.workspaces as ws

    def there(key: str) -> bool:
        return keys is None or key in keys

    shorts = None if layers is None else list(short_names(layers).values())
    sections = []
    for section in get_args(Section):
        plots = _model_plots([key for key in MODEL_KEYS if key.section == section and there(key.key)])
        panels: list[Any] = []
        if section == "Where":
            plots = _layer_plots(shorts, keys)
            if there(HEATMAP):
                panels.append(wr.MediaBrowser(title="Mean shift, layer x step", media_keys=[prefixed(prefix, HEATMAP)]))
        panels += [
            wr.LinePlot(
                title=plot.title,
                x=STEP,
                y=[prefixed(prefix, key) for key in plot.keys],
                metric_regex="^" + re.escape(prefixed(prefix, plot.pattern)) if plot.pattern else None,
                title_x="step",
                title_y=plot.unit,
            )
            for plot in plots
        ]
        tables = [table for table, (where, _) in _TABLES.items() if where == section and there(TABLE + table)]
        panels += [wr.WeavePanelSummaryTable(table_name=prefixed(prefix, TABLE + table)) for table in tables]
        if panels:
            text = [f"- **{plot.title}** ({plot.unit}): {plot.meaning}" for plot in plots]
            text += [f"- **{_TABLES[table][1]}**: the table `{TABLE}{table}`" for table in tables]
            panels.append(wr.MarkdownPanel(markdown="\n".join([f"### {section}", "", *text])))
        for position, panel in enumerate(panels):
            # the library draws them at random; so the same workspace is the same file
            panel._id = hashlib.sha256(f"{name}/{section}/{position}".encode()).hexdigest()[:12]
        if panels:
            layout = ws.SectionLayoutSettings(columns=3, rows=4 if section == "Where" else 3)
            sections.append(ws.Section(name=section, panels=panels, is_open=True, layout_settings=layout))
    settings = ws.WorkspaceSettings(x_axis=STEP)
    return ws.Workspace(entity=entity, project=project, name=name, sections=sections, settings=settings)


def logged_keys(history: RunHistory) -> set[str]:
    """The keys of bnkit in a W&B run with this history, with those of the heatmap and the tables at its end."""
    families = {measure.prefix for measure in LAYER_KEYS}
    model = {key.key for key in MODEL_KEYS}
    keys = {key for key in history.metrics if key in model or key.split("/", 1)[0] in families}
    keys |= {TABLE + name for name, table in history.tables.items() if table.rows}
    return keys | ({HEATMAP} if any(history.layers("bn_shift").values()) else set())


def to_json(workspace: Workspace) -> str:
    """The workspace as text, the same for the same workspace: what wandb-workspaces sends, and parses again."""
    view = workspace._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
    return json.dumps(view, indent=2, ensure_ascii=False) + "\n"


def create(workspace: Workspace) -> str:
    """Create the workspace at W&B; each call makes one more.

    Returns:
        Its URL.

    Raises:
        ValueError: When there is no W&B key.
        RuntimeError: When W&B refuses it.
    """
    _require_key()
    view: Any = workspace
    try:
        view.save()
    except Exception as error:  # of the network, of the server, of the key: W&B has no common class for them
        raise RuntimeError(
            f"W&B did not create the workspace in {workspace.entity}/{workspace.project} ({error}): check entity=... "
            f"and project=..., which must have a run, or write it to a file with output=workspace.json."
        ) from error
    return str(view.url)


def _model_plots(keys: list[ModelKey]) -> list[_Plot]:
    """A plot for each, but one for the median and the worst layer of the same measure."""
    groups: dict[tuple[str, str], list[ModelKey]] = {}
    for key in keys:
        groups.setdefault((re.sub(r", (median|worst) layer$", "", key.title), key.unit), []).append(key)
    return [
        _Plot(
            title=f"{title}, median and worst layer" if len(group) > 1 else group[0].title,
            unit=unit,
            meaning=group[0].meaning,
            keys=tuple(key.key for key in group),
        )
        for (title, unit), group in groups.items()
    ]


def _layer_plots(shorts: list[str] | None, keys: Collection[str] | None) -> list[_Plot]:
    """A plot for each measure of the layers, of those that were logged."""
    plots = []
    for measure in LAYER_KEYS:
        family = f"{measure.prefix}/"
        about = (f"{measure.title}, each layer", measure.unit, measure.meaning)
        if keys is not None and not any(key.startswith(family) for key in keys):
            continue
        if shorts is None or len(shorts) > _LINES:
            plots.append(_Plot(*about, (), pattern=family))
        else:
            lines = (family + short for short in shorts)
            plots.append(_Plot(*about, tuple(key for key in lines if keys is None or key in keys)))
    return plots


def _require_wandb_workspaces() -> None:
    try:
        import wandb_workspaces.workspaces  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'The W&B workspace needs wandb-workspaces ({error}): pip install "bnkit[workspace]".', name=error.name
        ) from error


def _require_key() -> None:
    """Raise where W&B would stop to ask for a key."""
    import wandb

    if not wandb.login(prompt=False):
        raise ValueError(
            "Creating a workspace needs a W&B key and there is none, or WANDB_MODE is not online: run `wandb login` or "
            "set WANDB_API_KEY, or write the workspace to a file with output=workspace.json."
        )
