// What a filter leaves of the traces of a figure.
(() => {
  const PER_POINT = [
    "x", "y", "z", "text", "hovertext", "customdata", "ids", "base", "width", "offset", "textposition", "labels", "values", "parents",
    "marker.color", "marker.size", "marker.symbol", "marker.opacity", "marker.colors", "marker.line.color", "marker.line.width", "marker.pattern.shape",
    "error_x.array", "error_x.arrayminus", "error_y.array", "error_y.arrayminus", "line.color", "meta.rows",
  ].map((path) => path.split("."));

  const at = (trace, path) => path.reduce((part, name) => (part ? part[name] : undefined), trace);
  function put(trace, [name, ...rest], value) {
    trace[name] = rest.length ? { ...trace[name] } : value;
    if (rest.length) put(trace[name], rest, value);
  }

  // The trace with the points whose rows pass (keep: one byte per row). Traces without rows stay as they are.
  function kept(trace, keep) {
    const rows = trace.meta && trace.meta.rows;
    if (!rows || !rows.length) return trace;
    if (Array.isArray(rows[0])) return keptCells(trace, rows, keep);
    const places = [];
    for (let n = 0; n < rows.length; n += 1) if (rows[n] < 0 || keep[rows[n]]) places.push(n);
    if (places.length === rows.length) return trace;
    const made = { ...trace };
    const pick = (list) => (Array.isArray(list) && list.length === rows.length ? places.map((n) => list[n]) : list);
    for (const path of PER_POINT) if (Array.isArray(at(trace, path))) put(made, path, pick(at(trace, path)));
    if (trace.dimensions) made.dimensions = trace.dimensions.map((one) => ({ ...one, values: pick(one.values) }));
    if (!places.some((n) => rows[n] >= 0)) made.visible = false;
    return made;
  }

  // Of a heat map: cells become empty; lines and columns of which a filter leaves nothing go.
  function keptCells(trace, rows, keep) {
    const gone = (row) => row >= 0 && !keep[row];
    const lost = (cells) => cells.some(gone) && !cells.some((row) => row >= 0 && keep[row]);
    const lines = rows.map((_, n) => n).filter((n) => !lost(rows[n]));
    const columns = rows[0].map((_, n) => n).filter((n) => !lost(rows.map((line) => line[n])));
    const grid = (cells, none) => cells && (Array.isArray(cells[0]) ? lines.map((i) => columns.map((j) => (gone(rows[i][j]) ? none : cells[i][j]))) : cells);
    const made = { ...trace, z: grid(trace.z, null), meta: { ...trace.meta, rows: grid(rows, -1) } };
    if (Array.isArray(trace.y)) made.y = lines.map((n) => trace.y[n]);
    if (Array.isArray(trace.x)) made.x = columns.map((n) => trace.x[n]);
    for (const [name, none] of [["text", ""], ["hovertext", ""], ["customdata", null]]) if (trace[name]) made[name] = grid(trace[name], none);
    if (!lines.length || !columns.length) made.visible = false;
    return made;
  }

  // Categories of which nothing is left would keep their place on the axis.
  function shrink(layout, data) {
    for (const [name, axis] of Object.entries(layout)) {
      if (!/^[xy]axis\d*$/.test(name) || !Array.isArray(axis.categoryarray)) continue;
      const left = new Set(data.filter((trace) => trace.visible !== false).flatMap((trace) => trace[name[0]] || []));
      axis.categoryarray = axis.categoryarray.filter((category) => left.has(category));
    }
  }

  klab.traces = { kept, shrink };
})();
