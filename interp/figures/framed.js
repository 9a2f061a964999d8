// In a frame: a wheel that moves nothing here is told to the page around (frame.js). VS Code's notebooks scroll by
// script, and would stand still while the pointer is over a report. And a link to a section is followed here: in a
// srcdoc frame it means the address of the notebook, and would leave the page.

if (parent !== window) {
  const PAUSE = 300; // ms: turns that have just come to an end of the page stop there
  let scrolled = -PAUSE;
  const moves = (node, by) =>
    (node === document.scrollingElement || /auto|scroll/.test(getComputedStyle(node).overflowY))
    && (by < 0 ? node.scrollTop > 0 : node.scrollTop + node.clientHeight < node.scrollHeight - 1);
  addEventListener("scroll", () => { scrolled = performance.now(); }, true);
  addEventListener("wheel", (event) => {
    const { deltaX, deltaY, deltaMode } = event;
    if (!deltaY || event.ctrlKey || event.defaultPrevented) return;
    for (let node = event.target; node; node = node.parentElement) if (moves(node, deltaY)) return;
    // a browser may have scrolled to the end before it tells of the wheel; it tells of that before the next frame
    requestAnimationFrame(() => {
      if (performance.now() - scrolled > PAUSE) parent.postMessage({ wheel: { deltaX, deltaY, deltaMode } }, "*");
    });
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#"]'), section = link && document.getElementById(link.hash.slice(1));
    if (!section) return;
    event.preventDefault();
    section.scrollIntoView();
  });
}
