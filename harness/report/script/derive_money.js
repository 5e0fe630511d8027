"use strict";
// Dollars at the prices of the sliders: the same numbers and sentences as figures/money.py, from the same table.
(() => {
  const USD = ["usd_per_mtok", "usd_per_mtok_low", "usd_per_mtok_high"];
  const TIMES = ["gpu_s_per_mtok", "gpu_s_per_mtok_low", "gpu_s_per_mtok_high"];
  const SPEED = ["tokens_per_s_per_user", "tokens_per_s_per_user_low", "tokens_per_s_per_user_high"];

  function figure3(value) {
    if (value >= 1e-4 && value < 999.5) return value.toPrecision(3);
    return value >= 1 ? value.toFixed(0) : value.toFixed(7);
  }
  const usd = (value) => `$${figure3(value)}`;
  const percent = (share) => `${(100 * share).toFixed(0)}%`;

  // A price of the address may be any text: only a positive number counts, and none beyond what the slider shows.
  function price(chip, own) {
    const name = `price.${chip}`;
    const set = Number(klab.state.get(name) ?? NaN);
    if (!(set > 0 && Number.isFinite(set))) return own;
    const slider = klab.state.controls().find((input) => input.dataset.state === name);
    return slider ? Math.min(Number(slider.max), Math.max(Number(slider.min), set)) : set;
  }

  // The rows that are shown as objects, at the prices that are set.
  function priced(table, shown) {
    return new Map(shown.map((position) => {
      const one = Object.fromEntries(table.columns.map((name, n) => [name, table.rows[position][n]]));
      one.usd_per_gpu_hour = price(one.chip, one.usd_per_gpu_hour);
      USD.forEach((name, n) => { one[name] = one[TIMES[n]] * one.usd_per_gpu_hour / 3600; });
      return [position, one];
    }));
  }

  function finding(rows, slos) {
    const best = new Map();
    for (const one of rows) {
      if (!one.keeps_slos || one.format !== rows[0].format) continue;
      if (!best.has(one.chip) || one.usd_per_mtok < best.get(one.chip).usd_per_mtok) best.set(one.chip, one);
    }
    const [first, ...others] = [...best.values()].sort((a, b) => a.usd_per_mtok - b.usd_per_mtok);
    if (!first) return `Nothing shown keeps ${slos}.`;
    const format = new Set(rows.map((one) => one.format)).size > 1 ? ` in ${rows[0].format}` : "";
    const said = [
      `Within ${slos} ${first.chip}${format} ${others.length ? "is the cheapest:" : "takes"} ${usd(first.usd_per_mtok)} per million tokens ` +
      `(${usd(first.usd_per_mtok_low)} to ${usd(first.usd_per_mtok_high)} by the doubt of its times) at ${usd(first.usd_per_gpu_hour)} per GPU-hour.`,
    ];
    if (others.length) {
      const second = others[0];
      const ratio = first.usd_per_mtok / second.usd_per_mtok;
      said.push(
        `That is ${percent(1 - ratio)} less than ${second.chip} (${usd(second.usd_per_mtok)}, ${usd(second.usd_per_mtok_low)} to ` +
        `${usd(second.usd_per_mtok_high)}, at ${usd(second.usd_per_gpu_hour)}), which would be as cheap at ${usd(second.usd_per_gpu_hour * ratio)} per GPU-hour; ` +
        (first.usd_per_mtok_high < second.usd_per_mtok_low ? "their ranges do not overlap." : "their ranges overlap, so the order is open."),
      );
    }
    const rests = (one) => `${one.chip} ${percent(one.measured_share)} measured, ${percent(one.reference_share)} published, ${percent(one.modelled_share)} modelled`;
    said.push(`Of the GPU time behind it ${[first, ...others].map(rests).join("; ")}.`);
    return said.join(" ");
  }

  klab.derive.money = (figure, shown) => {
    const rows = priced(figure.table, shown);
    for (const trace of figure.data) {
      if (!trace.meta || !trace.meta.part) continue;
      const held = trace.meta.rows.filter((position) => rows.has(position)).map((position) => rows.get(position));
      if (trace.meta.part === "band") {
        // There along the low end of the times, back along the high one.
        const turn = held.length / 2;
        trace.x = held.map((one, n) => one[SPEED[n < turn ? 2 : 1]]);
        trace.y = held.map((one, n) => one[USD[n < turn ? 1 : 2]]);
      } else {
        trace.y = held.map((one) => one.usd_per_mtok);
        trace.text = held.map((one) => `${figure3(one.usd_per_mtok_low)} to ${figure3(one.usd_per_mtok_high)}`);
      }
    }
    return `${finding([...rows.values()], figure.layout.meta.slos)} ${figure.layout.meta.words}`;
  };
})();
