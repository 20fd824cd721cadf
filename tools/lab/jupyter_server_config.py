"""What `make lab` does to a notebook before it saves it: an experiment is saved as it is committed, without outputs.

A run keeps its outputs in its report. All other notebooks keep theirs, cleaned by nbdev."""

from nbdev.clean import clean_jupyter, clean_nb


def drop_outputs(notebook):
    "Leave of a notebook what is committed: no outputs, no counts, of Jupyter's metadata only which sources are hidden."
    for cell in notebook['cells']:
        if cell['cell_type'] == 'code':
            cell.update(outputs=[], execution_count=None)
        if cell['metadata'].pop('jupyter', {}).get('source_hidden'):
            cell['metadata']['jupyter'] = dict(source_hidden=True)
    clean_nb(notebook, allowed_cell_metadata_keys=['tags', 'jupyter'])


def before_saving(model, path, **rest):
    "Clean the notebook in `model`; Jupyter then writes it to `path`, which begins at the folder that it serves."
    if model['type'] == 'notebook' and path.strip('/').startswith(('nbs/experiments/', 'nbs/explore.ipynb')):
        drop_outputs(model['content'])
    else:
        clean_jupyter(path=path, model=model, **rest)


settings = get_config()  # noqa: F821
settings.ContentsManager.pre_save_hook = before_saving
