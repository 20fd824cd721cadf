// Boxes that scroll take the focus, so that the keyboard can scroll them; those that do not scroll are no stop.
const scrollers = [...document.querySelectorAll('.md-typeset .figure, .md-typeset pre > code, .md-typeset .output .out, .md-typeset .formula, .md-typeset p:has(> img)')]
const watched = new ResizeObserver(entries => {
  for (const {target} of entries) {
    if (target.scrollWidth > target.clientWidth + 1 || target.scrollHeight > target.clientHeight + 1) target.tabIndex = 0
    else target.removeAttribute('tabindex')
  }
})
for (const box of scrollers) {
  watched.observe(box)
  for (const image of box.querySelectorAll('img')) image.addEventListener('load', () => { watched.unobserve(box); watched.observe(box) })
}
