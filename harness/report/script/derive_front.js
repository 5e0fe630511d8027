// The front of what a filter leaves: the same rule as figures/front.py, from the same table.
(() => {
  const UNBEATEN = 11, BEATEN = 6, LONGEST = 100;

  const scales = { us: [[1e6, "s"], [1e3, "ms"], [1, "µs"], [1e-3, "ns"]], J: [[1, "J"], [1e-3, "mJ"], [1e-6, "µJ"]] };

  function told(value, unit) {
    const known = scales[unit];
    if (!known) return `${Number(value.toPrecision(3))}${unit}`;
    const [scale, name] = known.find(([least]) => value >= least) || known[known.length - 1];
    return `${Number((value / scale).toPrecision(3))} ${name}`;
  }

  // The numbers of one row: [median, low, high]; an end that was not measured is the median.
  function numbers(row, columns, [median, low, high]) {
    const at = (name) => (name ? row[columns.indexOf(name)] : null);
    const middle = at(median);
    const or = (value) => (Number.isFinite(value) ? value : middle);
    return [middle, or(at(low)), or(at(high))];
  }

  // {line, unbeaten}: positions of rows of the table, among those that are shown.
  function front(table, shown, [x, y]) {
    const origin = table.columns.indexOf("origin");
    const able = [];
    for (const position of shown) {
      const row = table.rows[position];
      if (row[origin] !== "measured") continue;
      const one = { position, x: numbers(row, table.columns, x), y: numbers(row, table.columns, y) };
      if (Number.isFinite(one.x[0]) && Number.isFinite(one.y[0])) able.push(one);
    }
    const beats = (a, b) => a.x[0] <= b.x[0] && a.y[0] <= b.y[0] && (a.x[2] < b.x[1] || a.y[2] < b.y[1]);
    const unbeaten = able.filter((one) => !able.some((other) => beats(other, one)));
    const line = [];
    for (const one of [...able].sort((a, b) => a.x[0] - b.x[0] || a.y[0] - b.y[0] || a.position - b.position)) {
      if (!line.length || one.y[0] < line[line.length - 1].y[0]) line.push(one);
    }
    return { line, unbeaten, able };
  }

  function sentence(found, table, [x, y]) {
    const { line, unbeaten, able } = found;
    if (!line.length) return "The filter leaves nothing that was measured here.";
    const cell = (one, name) => table.rows[one.position][table.columns.indexOf(name)];
    const cut = (text) => (text.length > LONGEST ? `${text.slice(0, LONGEST - 3)}...` : text);
    const name = (one) => cut([cell(one, "kernel"), cell(one, "config")].filter((text) => text && text !== "-").join(" "));
    const first = line[0], last = line[line.length - 1];
    const start = `Of what the filter leaves (${able.length} ${able.length === 1 ? "mark" : "marks"}) nothing beats ${unbeaten.length}. `;
    const both = (one) => `${told(one.x[0], x[4])} and ${told(one.y[0], y[4])}`;
    if (line.length === 1) return `${start}Best in both ${x[3]} and ${y[3]}: ${name(first)}, ${both(first)}.`;
    return `${start}Least ${x[3]}: ${name(first)}, ${both(first)}. Least ${y[3]}: ${name(last)}, ${both(last)}.`;
  }

  klab.derive.front = (figure, shown) => {
    const drawn = figure.data.find((trace) => trace.meta && trace.meta.front);
    if (!drawn) return undefined;
    const ways = drawn.meta.front;
    const found = front(figure.table, shown, ways);
    const left = new Set(shown);
    const unbeaten = new Set(found.unbeaten.map((one) => one.position));
    // Traces are replaced, not changed: what a filter leaves whole is the page's own.
    figure.data = figure.data.map((trace) => {
      if (trace === drawn) return { ...trace, x: found.line.map((one) => one.x[0]), y: found.line.map((one) => one.y[0]) };
      if (!trace.meta || !trace.meta.rows || !trace.marker || !Array.isArray(trace.marker.size)) return trace;
      const size = trace.meta.rows.filter((row) => left.has(row)).map((row) => (unbeaten.has(row) ? UNBEATEN : BEATEN));
      return { ...trace, marker: { ...trace.marker, size } };
    });
    return shown.length === figure.table.rows.length ? undefined : sentence(found, figure.table, ways);
  };
})();
