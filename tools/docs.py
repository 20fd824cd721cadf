"""Make the docs site with Quarto; without Quarto, make what the site is rendered from, which finds most mistakes.

nbdev_docs itself would try to install a missing Quarto with administrator's rights, so it is only called where there is one."""
import shutil, subprocess, sys
from pathlib import Path

import nbdev.doclinks, nbdev.quarto
from nbdev.config import get_config
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent


def prepare():
    "Process every notebook into _proc, as nbdev_docs does before it calls Quarto; the pages that came out."
    nbdev.quarto.refresh_quarto_yml()
    nbdev.doclinks._build_modidx()
    return sorted(proc_nbs(n_workers=2, force=True).rglob('*.ipynb'))


def main():
    if shutil.which('quarto'): return subprocess.run([Path(sys.executable).with_name('nbdev_docs')], cwd=root).returncode
    print(f'{len(prepare())} pages are ready in _proc; install Quarto and run make docs again to render the site into {get_config().doc_path.name}')
    return 0


if __name__ == '__main__': sys.exit(main())
