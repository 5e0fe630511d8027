// Geometric means per operator under a filter: the same sums and draws as report/figures/chips_mean.py, from the rows that are left.
klab.derive.geomean = (figure, shown) => {
  const RESAMPLES = 1000, LEAST = 5, SEED = 20230, TAIL = RESAMPLES / 40;
  const STUDENT = [1.959964, 2.372272, 2.822499, 2.555852, 1.589535];
  const words = figure.layout.meta;
  const at = Object.fromEntries(figure.table.columns.map((name, n) => [name, n]));
  const rows = shown.map((row) => figure.table.rows[row]);
  const ratio = (row) => Number(row[at.ratio]);

  const uniform = () => {
    let state = SEED;
    return () => {
      state = (state + 0x6d2b79f5) | 0;
      let mixed = Math.imul(state ^ (state >>> 15), 1 | state);
      mixed = (mixed + Math.imul(mixed ^ (mixed >>> 7), 61 | mixed)) ^ mixed;
      return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
    };
  };
  const widening = (count) => {
    const student = STUDENT.reduce((total, term, power) => total + term / (count - 1) ** power, 0);
    return (student / STUDENT[0]) * Math.sqrt(count / (count - 1));
  };
  const mean = (name, ratios) => {
    const logs = ratios.map(Math.log);
    const sum = (values) => values.reduce((total, value) => total + value, 0);
    const middle = sum(logs) / logs.length;
    const found = { name, count: logs.length, ratio: Math.exp(middle), low: null, high: null };
    if (logs.length < LEAST) return found;
    const next = uniform();
    const means = new Float64Array(RESAMPLES);
    for (let n = 0; n < RESAMPLES; n++) {
      let total = 0;
      for (let k = 0; k < logs.length; k++) total += logs[Math.floor(next() * logs.length)];
      means[n] = total / logs.length;
    }
    means.sort();
    const end = (value) => Math.exp(middle + widening(logs.length) * (value - middle));
    return { ...found, low: end(means[TAIL]), high: end(means[RESAMPLES - 1 - TAIL]) };
  };
  const digits = (value) => (value >= 10 ? value.toFixed(1) : value >= 0.01 ? value.toFixed(3) : String(Number(value.toPrecision(2))));
  const text = (one) => `${digits(one.ratio)}×` + (one.low === null ? "" : ` [${digits(one.low)}, ${digits(one.high)}]`);
  const problems = (count) => `${count} problem${count === 1 ? "" : "s"}`;

  const groups = new Map();
  for (const row of rows) {
    const operator = String(row[at.operator]);
    if (!groups.has(operator)) groups.set(operator, []);
    groups.get(operator).push(ratio(row));
  }
  const before = (x, y) => x.ratio - y.ratio || (x.name < y.name ? -1 : 1);
  const each = [...groups].map(([name, ratios]) => mean(name, ratios)).sort(before);
  const every = rows.length ? mean("all", rows.map(ratio)) : null;

  const marks = figure.data.find((trace) => trace.meta && trace.meta.geomean);
  if (marks) {
    const drawn = every ? [...each].reverse().concat(every) : [];
    marks.x = drawn.map((one) => one.ratio);
    marks.y = drawn.map((one) => words.names[one.name] || one.name);
    marks.customdata = drawn.map((one) => `${text(one)}, ${problems(one.count)}`);
    marks.text = drawn.map((one) => ` ${text(one)}`);
    marks.error_x = {
      ...marks.error_x,
      array: drawn.map((one) => (one.high === null ? 0 : one.high - one.ratio)),
      arrayminus: drawn.map((one) => (one.low === null ? 0 : one.ratio - one.low)),
    };
  }

  // As `heights` of report/figures/chips_draw.py: a map of few families is no taller for that, and one of few sizes no wider.
  const map = figure.data.find((trace) => trace.type === "heatmap");
  const left = new Set(map ? map.meta.rows.flat().filter((row) => row >= 0) : []);
  if (map && every) {
    const upper = 26 * Math.max(map.z.length, 2), lower = 34 * (each.length + 1), inner = upper + lower + 80;
    figure.layout.height = inner + 126;
    figure.layout.xaxis.domain = [0, Math.min(1, 0.16 * map.z[0].length)];
    figure.layout.yaxis.domain = [(lower + 80) / inner, 1];
    figure.layout.yaxis2.domain = [0, lower / inner];
  }

  // As `_log_ticks` there: a filter may leave means that lie beyond those of all.
  if (every) {
    const ends = [1, ...[...each, every].flatMap((one) => [one.low ?? one.ratio, one.high ?? one.ratio])];
    const low = Math.min(...ends) / 1.08, high = Math.max(...ends) * 1.08, wide = high / low;
    const ticks = wide < 100 ? [0.3, 0.7, 1.5, 3] : [];
    if (wide < 3) ticks.push(0.6, 0.8, 0.9, 1.1, 1.2);
    if (wide < 1.4) ticks.push(0.95, 1.05);
    for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
      for (const step of wide < 1000 ? [1, 2, 5] : [1]) ticks.push(Number(`${step}e${power}`));
    }
    const kept = ticks.filter((tick) => low <= tick && tick <= high).sort((x, y) => x - y);
    Object.assign(figure.layout.xaxis2, { range: [Math.log10(low), Math.log10(high)], tickvals: kept, ticktext: kept.map((tick) => `${tick}×`) });
  }

  const { a, b, what, both } = words;
  const tell = () => {
    if (!every) return `No problem that ${both} is left.`;
    if (every.count === 1) return `${b} takes ${text(every)} of ${a}'s ${what} on the one problem that ${both}.`;
    let said = `${b} takes ${text(every)} of ${a}'s ${what}: the geometric mean over ${every.count} problems that ${both}`;
    said += every.low === null ? ", too few for an interval." : ".";
    if (every.low !== null && every.low <= 1 && 1 <= every.high) said += " The interval holds 1: taken together, neither is shown to be ahead.";
    const least = each[0], most = each[each.length - 1];
    if (digits(least.ratio) !== digits(most.ratio)) {
      said += ` Lowest in ${least.name} (${text(least)}, ${problems(least.count)}), highest in ${most.name} (${text(most)}, ${problems(most.count)}).`;
    }
    return `${said} ${b} takes more on ${rows.filter((row) => ratio(row) > 1).length} of ${every.count}.`;
  };
  const lost = rows.length - left.size;
  const brackets = [every, ...each].some((one) => one && one.low !== null) ? words.brackets : "";
  const away = lost ? `${problems(lost)} of further families or sizes ${lost === 1 ? "is" : "are"} not drawn, but in the means.` : "";
  return [tell(), words.reading, brackets, away, words.basis].filter(Boolean).join(" ");
};
