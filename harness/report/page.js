"use strict";
// Draws each <script type="application/json"> in the element before it. Colours written as var(--name) follow the page's theme.
(() => {
  const plots = [...document.querySelectorAll("script[type='application/json']")].map((source) => {
    const { data, layout } = JSON.parse(source.textContent);
    return { target: document.getElementById(source.id.replace(/-data$/, "")), data, layout };
  });
  // Without showSendToCloud: false, Plotly offers a button that sends the figure to its makers.
  const config = { responsive: true, displaylogo: false, showSendToCloud: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };

  // Scripts run before the print style applies, so its colours are here too.
  const paper = { "--ink": "#000", "--soft": "#444", "--faint": "#bbb", "--card": "#fff" };
  let printing = false;

  function themed(value) {
    const style = getComputedStyle(document.documentElement);
    const walk = (item) => {
      if (typeof item === "string") return item.replace(/var\((--[a-z]+)\)/g, (_, name) => (printing ? paper[name] : style.getPropertyValue(name).trim()));
      if (Array.isArray(item)) return item.map(walk);
      if (item && typeof item === "object") return Object.fromEntries(Object.entries(item).map(([k, v]) => [k, walk(v)]));
      return item;
    };
    return walk(value);
  }

  function draw() {
    const narrow = window.innerWidth < 700;
    for (const plot of plots) {
      const layout = themed(plot.layout);
      layout.font = { color: themed("var(--ink)"), size: narrow ? 11 : 12, family: getComputedStyle(document.body).fontFamily };
      layout.hoverlabel = { bgcolor: themed("var(--card)"), bordercolor: themed("var(--soft)"), font: { color: themed("var(--ink)") } };
      layout.modebar = { bgcolor: "rgba(0,0,0,0)", color: themed("var(--faint)"), activecolor: themed("var(--soft)") };
      for (const menu of layout.updatemenus || []) {
        menu.bgcolor = themed("var(--card)");
        menu.bordercolor = themed("var(--faint)");
      }
      // The legend lies below: it takes height of its own, not the plot's.
      const entries = plot.data.filter((trace) => trace.visible !== false).length;
      layout.height += 18 * Math.max(0, Math.ceil(entries / (narrow ? 1 : 4)) - 3);
      if (narrow) layout.margin = { ...layout.margin, l: 48, r: 8 };
      // Names of rows would leave no width for the rows; a touch still tells them.
      if (narrow && layout.yaxis && layout.yaxis.ticktext) layout.yaxis.showticklabels = false;
      Plotly.react(plot.target, themed(plot.data), layout, config);
    }
  }

  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("(max-width: 699px)").addEventListener("change", draw);
  const unfold = () => document.querySelectorAll("details").forEach((part) => { part.open = true; });
  addEventListener("beforeprint", () => { printing = true; unfold(); draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });
  document.documentElement.dataset.drawn = String(plots.length);
})();
