// Without a mouse, a finger scrolls the page, not a plot. Panels stand in two columns on a phone.
const mouse = matchMedia("(hover: hover)").matches;
const config = {responsive: true, displaylogo: false, displayModeBar: mouse && "hover",
  modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]};
for (const [id, {data, layout}] of Object.entries(figures)) {
  const place = document.getElementById(id);
  const panels = Object.keys(layout).filter(key => key.startsWith("yaxis"));
  if (layout.grid && place.clientWidth < 600) {
    const rows = Math.ceil(panels.length / 2);
    Object.assign(layout.grid, {columns: 2, rows: rows, xgap: 0.18});
    layout.height = 120 + 210 * rows;
    panels.forEach((axis, i) => { layout[axis].showticklabels = i % 2 == 0; });
  }
  if (layout.height) place.style.height = layout.height + "px";
  if (!mouse) layout.dragmode = false;
  Plotly.newPlot(place, data, layout, config);
}
const fit = () => Object.keys(figures).forEach(id => Plotly.Plots.resize(id));
window.addEventListener("beforeprint", fit);
window.addEventListener("afterprint", fit);
