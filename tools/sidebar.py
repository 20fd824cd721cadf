"""The order of the pages: nbs/sidebar.yml, which Quarto could read, as MkDocs wants it."""

import fnmatch
import posixpath
import re


def by_number(source):
    "Sorts notebooks by the number in front of their names, others by name."
    folder, name = posixpath.split(source)
    number = re.match(r'\d+', name)
    return folder, int(number[0]) if number else 0, name


class Sidebar:
    "Takes the pages that entries name, each once."

    def __init__(self, pages):
        self.pages = pages  # source -> (page, title)
        self.used = set()

    def matching(self, pattern):
        "The sources that an entry means: itself, or where it has a *, what is left in its folder."
        pattern = pattern.removeprefix('/')
        if '*' not in pattern:
            return [pattern]
        folder = posixpath.dirname(pattern)
        beside = [one for one in self.pages if posixpath.dirname(one) == folder]
        return sorted(set(fnmatch.filter(beside, pattern)) - self.used, key=by_number)

    def take(self, source):
        if source not in self.pages:
            raise SystemExit(f'nbs/sidebar.yml names {source}, which is not there')
        self.used.add(source)
        page, title = self.pages[source]
        return {'Home' if page == 'index.md' else title: page}

    def entries(self, contents):
        "What MkDocs lists for the contents of a section: a pattern, or a list of patterns and sections."
        if isinstance(contents, str):
            contents = [contents]
        listed = []
        for one in contents:
            if isinstance(one, dict):
                listed.append({one['section']: self.entries(one['contents'])})
            else:
                listed += [self.take(source) for source in self.matching(one)]
        return [one for one in listed if next(iter(one.values()))]


def navigation(
    contents,  # those of the sidebar in nbs/sidebar.yml
    pages,  # source -> (page, title)
):
    "The sidebar as MkDocs writes it; a page that no entry names is an error."
    sidebar = Sidebar(pages)
    listed = sidebar.entries(contents)
    left = sorted(set(pages) - sidebar.used)
    if left:
        raise SystemExit(f'nbs/sidebar.yml leaves out {", ".join(left)}')
    return listed
