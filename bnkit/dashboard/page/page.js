"use strict";
(() => {
  const { themes, drawings } = JSON.parse(document.getElementById("payload").textContent);
  const root = document.documentElement;
  const button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const config = {
    responsive: true,
    displaylogo: false,
    showSendToCloud: false,
    // By name, and no others: plotly adds buttons of its own, one of which sends the figure to a server.
    modeBarButtons: [["toImage"], ["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
    toImageButtonOptions: { format: "svg" },
  };
  const copy = (value) => JSON.parse(JSON.stringify(value));
  const plotOf = (name) => document.querySelector(`.plot[data-drawing="${name}"]`);
  const chosen = {};
  let theme = root.dataset.theme;
  let byHand = false;

  // What is blank in a heatmap must differ from its darkest colour, on both themes.
  const themed = (figure) => ({
    template: themes[theme],
    plot_bgcolor: figure.data[0].type === "heatmap" ? getComputedStyle(root).getPropertyValue("--blank").trim() : "rgba(0,0,0,0)",
  });

  const draw = (name) => {
    const variant = drawings[name][chosen[name] || 0];
    const plot = plotOf(name);
    const figure = copy(variant.figure);
    plot.style.minHeight = `${figure.layout.height}px`;
    plot.setAttribute("aria-label", variant.alternative);
    const note = document.querySelector(`[data-note="${name}"]`);
    note.textContent = variant.note;
    note.hidden = !variant.note;
    return Plotly.react(plot, figure.data, { ...figure.layout, ...themed(figure) }, config);
  };

  const setTheme = (next) => {
    theme = next;
    root.dataset.theme = theme;
    button.setAttribute("aria-pressed", String(theme === "dark"));
    const drawn = Object.keys(drawings).map(plotOf).filter((plot) => plot.data);
    return Promise.all(drawn.map((plot) => Plotly.relayout(plot, themed(plot))));
  };

  const element = (tag, text, attributes = {}) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };

  const short = (value) => {
    if (value === null) return "unknown";
    if (typeof value !== "number") return String(value) || "(the model itself)";
    if (Number.isInteger(value)) return value.toLocaleString("en").replace("-", "−");
    return Number(value.toPrecision(3)).toString().replace("-", "−");
  };

  // The table of a figure's numbers, when it is asked for: 200 layers of channels would make the page slow otherwise.
  const fill = (details) => {
    const name = details.dataset.drawing;
    const variant = drawings[name][chosen[name] || 0];
    details.querySelector(".scroll")?.remove();
    const box = element("div", undefined, { class: "scroll", role: "group", tabindex: "0", "aria-label": variant.alternative });
    const table = box.appendChild(element("table"));
    table.append(element("caption", variant.alternative));
    const head = table.createTHead().insertRow();
    variant.columns.forEach((column, index) => {
      const right = variant.rows.some((row) => typeof row[index] === "number");
      head.append(element("th", column, { scope: "col", class: right ? "number" : "" }));
    });
    const body = table.createTBody();
    for (const row of variant.rows) {
      const line = body.insertRow();
      row.forEach((value, index) => {
        const kind = value === null ? "unknown right" : typeof value === "number" ? "number" : "name";
        const attributes = { class: kind, "data-value": value === null ? "" : String(value) };
        line.append(index ? element("td", short(value), attributes) : element("th", short(value), { ...attributes, scope: "row" }));
      });
    }
    details.append(box);
  };

  const sort = (header) => {
    const body = header.closest("table").tBodies[0];
    const index = [...header.parentNode.children].indexOf(header);
    const numeric = header.classList.contains("number");
    // Numbers are mostly looked at from the largest down, names from A.
    const order = numeric ? ["descending", "ascending", "none"] : ["ascending", "descending", "none"];
    const next = order[(order.indexOf(header.ariaSort) + 1) % 3];
    for (const other of header.parentNode.children) other.ariaSort = "none";
    header.ariaSort = next;
    const sign = next === "descending" ? -1 : 1;
    const key = (row) => row.cells[index].dataset.value;
    const rows = [...body.rows];
    rows.forEach((row, position) => (row.dataset.position ??= position));
    rows.sort((a, b) => {
      const original = a.dataset.position - b.dataset.position;
      if (next === "none") return original;
      const [one, two] = [key(a), key(b)];
      if ((one === "") !== (two === "")) return one === "" ? 1 : -1; // what is not known is last, whichever the order
      const difference = numeric ? one - two : one < two ? -1 : one > two ? 1 : 0;
      return sign * difference || original;
    });
    body.append(...rows);
  };

  const filter = (input) => {
    const rows = [...document.querySelectorAll(`#table-${input.dataset.table} tbody tr`)];
    const wanted = input.value.trim().toLowerCase();
    for (const row of rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    input.parentNode.querySelector("output").textContent = `${rows.filter((row) => !row.hidden).length} of ${rows.length}`;
  };

  button.addEventListener("click", () => {
    byHand = true;
    setTheme(theme === "dark" ? "light" : "dark");
  });
  system.addEventListener("change", () => byHand || setTheme(system.matches ? "dark" : "light"));
  for (const select of document.querySelectorAll("select[data-drawing]")) {
    select.addEventListener("change", () => {
      const name = select.dataset.drawing;
      chosen[name] = Number(select.value);
      draw(name);
      const details = document.querySelector(`details[data-drawing="${name}"]`);
      if (details.open) fill(details);
    });
  }
  for (const details of document.querySelectorAll("details[data-drawing]")) {
    details.addEventListener("toggle", () => details.open && fill(details));
  }
  for (const header of document.querySelectorAll(".table thead th")) {
    header.querySelector("button").addEventListener("click", () => sort(header));
  }
  for (const input of document.querySelectorAll("input[data-table]")) input.addEventListener("input", () => filter(input));

  let before;
  addEventListener("beforeprint", () => {
    before = theme;
    setTheme("light");
  });
  addEventListener("afterprint", () => setTheme(before));

  // One figure a frame, so that the words and the tables answer while the figures are being drawn.
  const names = Object.keys(drawings);
  // What scrolls can be reached by keyboard; what does not is no stop on the way.
  const reachable = () => {
    for (const box of document.querySelectorAll(".scroll")) {
      if (box.scrollWidth > box.clientWidth || box.scrollHeight > box.clientHeight) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  const next = async () => {
    const name = names.shift();
    if (name === undefined) {
      reachable();
      addEventListener("resize", reachable);
      root.dataset.drawn = "all";
      return;
    }
    await draw(name);
    setTimeout(next);
  };
  setTheme(theme);
  next();
})();
