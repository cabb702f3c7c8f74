"Build the docs site from the notebooks, without Quarto and without running them; a broken link is an error."
import re, shutil, sys
from pathlib import Path

from nbdev.config import get_config
from nbdev.serve import proc_nbs
from smalldocs.site import build

SOURCE = re.compile(r'\[source\]\(/blob/[^)]*\)\{[^}]*\}')  # nbdev's link for a project that names no repository
PRIVATE = re.compile(r'\[(`_[^`]*`)\]\(/[^)]*\)')  # and its link to a function that has no entry on the page


def make_site(root):
    "Build the site of the project in folder `root` into its `_docs` and return that; SystemExit if a link is broken."
    proc = proc_nbs(root/'nbs', force=True, n_workers=2)
    for p in proc.rglob('*.ipynb'):
        text = PRIVATE.sub(r'\1', p.read_text(encoding='utf-8'))
        p.write_text(text if get_config(root).git_url else SOURCE.sub('', text), encoding='utf-8')
    site,docs = build(proc, quiet=True),root/'_docs'
    if site.broken: sys.exit('broken links:\n' + '\n'.join(f'  {page}: {to}' for page,to in sorted(set(site.broken))))
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(site.out, docs)
    shutil.rmtree(proc)
    print(f'{len(site.pages)} pages in {docs.name}')
    return docs

if __name__=='__main__': make_site(Path(__file__).resolve().parents[1])
