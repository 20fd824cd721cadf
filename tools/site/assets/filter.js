// A field above the tables of the parameters page that hides the rows without the typed words.
const first = document.querySelector('.parameters')
if (document.getElementById('finetune.outputs')) {
  const field = Object.assign(document.createElement('input'), {type: 'search', className: 'filter', placeholder: 'Filter: learning rate, seed, lora ...'})
  field.setAttribute('aria-label', 'Show only parameters with these words')
  first.parentNode.insertBefore(field, document.querySelector('.md-content h2'))
  field.addEventListener('input', () => {
    const words = field.value.toLowerCase().replaceAll('_', ' ').split(' ').filter(Boolean)
    for (const row of document.querySelectorAll('.parameters tbody tr')) {
      const text = row.textContent.toLowerCase().replaceAll('_', ' ')
      row.hidden = !words.every(word => text.includes(word))
    }
  })
}
