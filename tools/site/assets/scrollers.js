// Boxes that scroll take the focus, so that the keyboard can scroll them; those that do not scroll are no stop.
// data-more says where a box has more than it shows, for the style sheet.
const scrollers = [...document.querySelectorAll('.md-typeset .figure, .md-typeset pre > code, .md-typeset .output .out, .md-typeset .formula, .md-typeset p:has(> img), .md-typeset .scroll')]
function mark(box) {
  const right = box.scrollWidth - box.clientWidth, below = box.scrollHeight - box.clientHeight
  if (right > 1 || below > 1) box.tabIndex = 0
  else box.removeAttribute('tabindex')
  const more = [right - box.scrollLeft > 4 && 'right', below - box.scrollTop > 4 && 'below'].filter(Boolean).join(' ')
  if (more) box.dataset.more = more
  else delete box.dataset.more
}
const watched = new ResizeObserver(entries => { for (const {target} of entries) mark(target) })
for (const box of scrollers) {
  watched.observe(box)
  box.addEventListener('scroll', () => mark(box), {passive: true})
  for (const image of box.querySelectorAll('img')) image.addEventListener('load', () => mark(box))
}
