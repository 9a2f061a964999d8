// Draws the gallery's figures as they come into view, in the colours of the page.
{
  const places = document.querySelectorAll(".gallery-figure");
  const base = new URL("..", document.currentScript.src);
  const loaded = {};
  const load = (address) => loaded[address] ??= new Promise((done, failed) => {
    const script = Object.assign(document.createElement("script"), { src: new URL(address, base) });
    Object.assign(script, { onload: done, onerror: failed });
    document.head.append(script);
  });
  const colours = () => {
    const style = getComputedStyle(document.body);
    const [text, faint] = ["--md-typeset-color", "--md-default-fg-color--lightest"].map((name) => style.getPropertyValue(name).trim());
    return { text, faint };
  };
  const themed = (layout) => {
    const { text, faint } = colours();
    const shown = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)" };
    shown.font = { ...layout.font, color: text };
    for (const axis of Object.keys(layout).concat("xaxis", "yaxis").filter((key) => /^[xy]axis\d*$/.test(key)))
      shown[axis] = { ...layout[axis], gridcolor: faint, zerolinecolor: faint, linecolor: faint };
    return shown;
  };
  const draw = async (place) => {
    const name = place.dataset.figure;
    await load("assets/plotly.min.js");
    await load(`gallery/figures/${name}.js`);
    const { data, layout } = structuredClone(window.galleryFigures[name]);
    const wide = layout.width > place.clientWidth;
    await Plotly.react(place, data, themed(layout), { responsive: !layout.width, displaylogo: false });
    place.classList.toggle("wide", wide);
    place.dataset.drawn = "yes";
  };
  const seen = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries)
      if (isIntersecting) {
        seen.unobserve(target);
        draw(target).catch(() => { target.textContent = "This figure was not drawn."; });
      }
  }, { rootMargin: "400px" });
  for (const place of places) seen.observe(place);
  new MutationObserver(() => {
    for (const place of places) if (place.dataset.drawn) draw(place);
  }).observe(document.body, { attributes: true, attributeFilter: ["data-md-color-scheme"] });
}
