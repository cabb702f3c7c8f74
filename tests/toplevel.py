"Write the files that hosts look for from the pages and the settings: CONTRIBUTING.md, CHANGELOG.md, CITATION.cff."
import re
from configparser import ConfigParser

from readme import ROOT, readme

PAGES = {'CONTRIBUTING.md':'contributing', 'CHANGELOG.md':'changelog'}

def citation():
    "Return CITATION.cff: title, version, authors, licence, as settings.ini and the package have them."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini', encoding='utf-8')
    cfg = ini['DEFAULT']
    version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (ROOT/'phantom_nb/__init__.py').read_text())[1]
    words = '\n'.join(f'  - {word}' for word in cfg['keywords'].split())
    return f'''cff-version: 1.2.0
message: Please cite this software, and the paper of the method that you used.
type: software
title: {cfg['lib_name']}
abstract: "{cfg['description']}"
authors:
  - name: {cfg['author']}
version: {version}
license: {cfg['license']}
keywords:
{words}
'''

def toplevel():
    "Return the content of each file."
    return {name:readme(ROOT/f'nbs/{page}.ipynb') for name,page in PAGES.items()} | {'CITATION.cff':citation()}

if __name__=='__main__':
    for name,text in toplevel().items(): (ROOT/name).write_text(text, encoding='utf-8')
