"Write README.md from nbs/index.ipynb: hidden cells and directives go, outputs stay, links follow the repository."
import re
from pathlib import Path

from fastcore.nbio import nb2str
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import clean_magics, filter_stream_, hide_, hide_line, rm_export, rm_header_dash, strip_ansi
from nbformat import reads
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
KINDS = ['text/markdown', 'text/html', 'text/plain', 'image/png']  # of output, best first
LINK = re.compile(r'(\]\(|<(?:img|a) [^>]*(?:src|href)=")([^)\s"]+)')


def echo_(cell, shown='true'):
    "Leave the source of a cell out where `#| echo: false` asks for it."
    if shown=='false': cell.metadata['transient'] = dict(remove_source=True)

def _to_repository(m):
    "Point a link of the docs, relative to nbs/, at the file in the repository."
    start,to = m.groups()
    if re.match(r'[a-z]+:|[#/]', to): return m[0]
    return start + (to[3:] if to.startswith('../') else f'nbs/{to}')

def relink(cell):
    "Rewrite links in prose and in Markdown outputs, outside fenced code."
    def f(s):
        parts = re.split(r'(```.*?```)', s, flags=re.S)
        return ''.join(o if o.startswith('```') else LINK.sub(_to_repository, o) for o in parts)
    if cell.cell_type=='markdown': cell.source = f(cell.source)
    for out in cell.get('outputs', []):
        md = out.get('data', {}).get('text/markdown')
        if md: out['data']['text/markdown'] = f(''.join(md))

def readme(path=ROOT/'nbs/index.ipynb'):
    "Return the notebook at `path` as Markdown; ValueError if it holds a picture that is not a file."
    procs = [echo_, strip_ansi, hide_line, filter_stream_, rm_header_dash, rm_export, clean_magics, hide_, relink]
    nb = NBProcessor(path, procs=procs, process=True).nb
    nb.metadata['language_info'] = dict(name='python')
    exporter = MarkdownExporter(config=Config(NbConvertBase=dict(display_data_priority=KINDS)))
    text,resources = exporter.from_notebook_node(reads(nb2str(nb), as_version=4))
    if resources['outputs']: raise ValueError('README.md cannot hold pictures: save them in nbs/images and link')
    text = re.sub(r'<style.*?</style>\n?', '', text, flags=re.S)
    return re.sub(r'\n{3,}', '\n\n', text).strip() + '\n'

if __name__=='__main__': (ROOT/'README.md').write_text(readme(), encoding='utf-8')
