"use strict";
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = () => ({
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: css("--line") },
    axis: { labelColor: css("--ink"), titleColor: css("--soft"), gridColor: css("--line"), domainColor: css("--line"), tickColor: css("--line"), titleFontWeight: "normal" },
    legend: { labelColor: css("--ink"), titleColor: css("--soft"), titleFontWeight: "normal" },
    text: { color: css("--ink") }, rule: { color: css("--ink") }, line: { color: css("--strong") },
  });
  // Titles and ticks of a narrow screen are those of a wide one, only fewer.
  const timelines = new Map();

  async function draw(node) {
    const target = document.getElementById(node.dataset.chart);
    const spec = JSON.parse(node.textContent);
    const zooms = (spec.params || []).some((p) => p.name === "from_us");
    const width = Math.max(280, target.clientWidth - 10);
    // Parts of a concatenation have no container to measure.
    if (spec.vconcat) for (const part of spec.vconcat) part.width = width - 110;
    else spec.width = width;
    if (zooms) target.dataset.whole = spec.usermeta.whole_us;
    const old = timelines.get(target);
    if (old) old.finalize();
    // Thousands of bars are drawn on a canvas, everything else as SVG with its texts.
    const { view, finalize } = await vegaEmbed(target, spec, { actions: false, renderer: zooms ? "canvas" : "svg", config: config(), tooltip: { theme: dark.matches ? "dark" : "light" } });
    timelines.set(target, { view, finalize });
    if (zooms && !target.dataset.zooms) follow(target);
  }

  function follow(target) {
    target.dataset.zooms = "yes";
    const now = () => timelines.get(target).view;
    const whole = [0, Number(target.dataset.whole)];
    const set = (from, to) => {
      const span = Math.max(20, Math.min(to - from, whole[1] - whole[0]));
      from = Math.min(Math.max(from, whole[0]), whole[1] - span);
      now().signal("from_us", from).signal("to_us", from + span).run();
    };
    const zoom = (factor, at = 0.5) => {
      const [from, to] = [now().signal("from_us"), now().signal("to_us")];
      const middle = from + (to - from) * at, span = (to - from) * factor;
      set(middle - span * at, middle + span * (1 - at));
    };
    const move = (share) => {
      const [from, to] = [now().signal("from_us"), now().signal("to_us")];
      set(from + (to - from) * share, to + (to - from) * share);
    };
    const does = { in: () => zoom(0.5), out: () => zoom(2), left: () => move(-0.25), right: () => move(0.25), all: () => set(...whole) };
    for (const button of target.parentElement.querySelectorAll("[data-zoom]")) button.addEventListener("click", does[button.dataset.zoom]);
    const keys = { "+": "in", "=": "in", "-": "out", ArrowLeft: "left", ArrowRight: "right", 0: "all" };
    target.addEventListener("keydown", (event) => { if (keys[event.key]) { event.preventDefault(); does[keys[event.key]](); } });
    const place = (event) => { const box = target.getBoundingClientRect(); return Math.min(1, Math.max(0, (event.clientX - box.left - 60) / (box.width - 110))); };
    target.addEventListener("wheel", (event) => { if (event.ctrlKey || event.shiftKey || event.altKey) { event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8, place(event)); } }, { passive: false });
    let held = null;
    target.addEventListener("pointerdown", (event) => { held = event.clientX; });
    target.addEventListener("pointermove", (event) => { if (held !== null && event.buttons) { move((held - event.clientX) / target.clientWidth); held = event.clientX; } });
    window.addEventListener("pointerup", () => { held = null; });
  }

  const all = () => Promise.all([...document.querySelectorAll("script[data-chart]")].map(draw));
  all().then(() => { document.documentElement.dataset.drawn = "yes"; });
  dark.addEventListener("change", all);
})();
