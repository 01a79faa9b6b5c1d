// Which colour stands for which skills: each has a hue of its own, a fusion the mixture by weights.

const OPACITY = 0.3; // over the paper, so that one set serves light and dark

function rgb(names, name) {
  const hue = (0.58 + names.indexOf(name) / names.length) % 1;
  const [saturation, lightness] = [0.7, 0.55];
  const reach = saturation * Math.min(lightness, 1 - lightness);
  return [0, 8, 4].map((n) => {
    const k = (n + hue * 12) % 12;
    return 255 * (lightness - reach * Math.max(-1, Math.min(k - 3, 9 - k, 1)));
  });
}

export const colour = (names, name) => `rgb(${rgb(names, name).map(Math.round).join(" ")})`;

export function blend(names, fusion) {
  const shares = Object.entries(fusion).filter(([name]) => names.includes(name));
  const total = shares.reduce((sum, [, weight]) => sum + weight, 0);
  if (!total) return "transparent"; // the base model
  const mixed = [0, 1, 2].map((i) =>
    shares.reduce((sum, [name, weight]) => sum + (weight / total) * rgb(names, name)[i], 0));
  return `rgb(${mixed.map((part) => Math.max(0, Math.min(255, Math.round(part)))).join(" ")} / ${OPACITY})`;
}

// `sql 0.53 + email 0.47`, `sql`, or `base`.
export function label(fusion) {
  const shares = Object.entries(fusion).sort(([, a], [, b]) => b - a);
  if (!shares.length) return "base";
  if (shares.length === 1) return shares[0][0];
  return shares.map(([name, weight]) => `${name} ${weight.toFixed(2)}`).join(" + ");
}
