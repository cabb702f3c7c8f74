"Build the docs site from the notebooks, without Quarto and without running them; a broken link is an error."
import os, re, shutil, sys
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote

from nbdev.config import get_config
from nbdev.serve import proc_nbs
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer
from smalldocs.site import build

SOURCE = re.compile(r'\[source\]\(/blob/[^/)]*/([^)#]*)#L(\w+)\)')  # nbdev's link for a project that names no repository
PRIVATE = re.compile(r'\[(`_[^`]*`)\]\(/[^)]*\)')  # and its link to a function that has no entry on the page
PLACE = 'https://source.invalid/'  # stands for the folder of source pages until the site is written
STYLE = 'a {color: inherit; text-decoration: none} :target {background: #ffef9e} body {font-size: .85em}'


def write_source(root, docs):
    "Write a page for every module, a line an anchor, for the site's links to source code."
    for p in sorted((root/'phantom_nb').rglob('*.py')):
        name = p.relative_to(root).as_posix()
        form = HtmlFormatter(full=True, linenos='inline', lineanchors='L', anchorlinenos=True, title=name, cssclass='source')
        to = docs/'source'/f'{name[:-3]}.html'
        to.parent.mkdir(parents=True, exist_ok=True)
        page = highlight(p.read_text(encoding='utf-8'), PythonLexer(), form)
        to.write_text(page.replace('</style>', f'{STYLE}</style>', 1).replace('<html>', '<html lang="en">', 1), encoding='utf-8')

def link_source(docs):
    "Lead the links to source code to the lines of these pages."
    for p in docs.rglob('*.html'):
        text = p.read_text(encoding='utf-8')
        if PLACE not in text: continue
        up = os.path.relpath(docs/'source', p.parent).replace(os.sep, '/')
        p.write_text(re.sub(rf'{PLACE}([\w/]+)\.py#L(\d+)', rf'{up}/\1.html#L-\2', text), encoding='utf-8')

def link_methods(docs):
    "Lead a link to a method that has no entry of its own to the entry of its class."
    ids = {p:set(re.findall(r'\bid="([^"]+)"', p.read_text(encoding='utf-8'))) for p in docs.rglob('*.html')}
    for p in ids:
        def lead(m):
            to = (p.parent/m[1]).resolve() if m[1] else p
            return m[0] if m[2]+m[3] in ids.get(to, {m[2]+m[3]}) else f'href="{m[1]}#{m[2]}"'
        text = p.read_text(encoding='utf-8')
        p.write_text(re.sub(r'href="([^":#]*)#([\w-]+)(\.[\w.-]+)"', lead, text), encoding='utf-8')

def open_menus(docs):
    "Let the keyboard open the sections of the sidebar: smalldocs makes them, and their arrows, links that lead nowhere."
    for p in docs.rglob('*.html'):
        text = p.read_text(encoding='utf-8')
        text = re.sub(r'(sidebar-item-toggle[^>]*) role="navigation"', r'\1 aria-hidden="true"', text)
        p.write_text(re.sub(r'data-bs-target="(#[^"]+)" role="navigation"', r'data-bs-target="\1" href="\1" role="button"', text), encoding='utf-8')

def size_images(docs):
    "Give each picture its width and height: the text below it does not move when it is drawn."
    for p in docs.rglob('*.html'):
        def sized(m):
            if m[1].startswith('http'): return m[0]
            file = BytesIO(b64decode(m[1].partition(',')[2])) if m[1].startswith('data:') else p.parent/unquote(m[1])
            with Image.open(file) as image: return '{} width="{}" height="{}"'.format(m[0], *image.size)
        text = p.read_text(encoding='utf-8')
        p.write_text(re.sub(r'<img (?![^>]* width=")[^>]*?\bsrc="([^"]+)"', sized, text), encoding='utf-8')

def drop_fonts(docs):
    "Take the themes' fonts from the reader's machine: nothing is loaded from elsewhere before the first paint."
    for p in (docs/'site_libs').rglob('*.css'):
        text = p.read_text(encoding='utf-8')
        p.write_text(re.sub(r'@import url\(https://fonts\.[^)]*\);', '', text), encoding='utf-8')

def make_site(root):
    "Build the site of the project in folder `root` into its `_docs` and return that; SystemExit if a link is broken."
    proc,own = proc_nbs(root/'nbs', force=True, n_workers=2),not get_config(root).git_url
    for p in proc.rglob('*.ipynb'):
        text = PRIVATE.sub(r'\1', p.read_text(encoding='utf-8'))
        if own: text = SOURCE.sub(lambda m: f'[source]({PLACE}{m[1]}#L{m[2]})' if m[2].isdigit() else '', text)
        p.write_text(text, encoding='utf-8')
    site,docs = build(proc, quiet=True),root/'_docs'
    if site.broken: sys.exit('broken links:\n' + '\n'.join(f'  {page}: {to}' for page,to in sorted(set(site.broken))))
    shutil.rmtree(docs, ignore_errors=True)
    shutil.move(site.out, docs)
    shutil.rmtree(proc)
    if own:
        write_source(root, docs)
        link_source(docs)
    link_methods(docs)
    open_menus(docs)
    size_images(docs)
    drop_fonts(docs)
    print(f'{len(site.pages)} pages in {docs.name}')
    return docs

if __name__=='__main__': make_site(Path(__file__).resolve().parents[1])
