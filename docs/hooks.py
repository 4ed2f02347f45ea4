"""Makes links of the pages to files outside docs/ work on the site.

In a checkout and on GitHub they lead to the file. The site does not have these files, so there they lead to
the repository, or become plain text where no repository is known. tests/test_docs.py checks that they exist.
"""

import posixpath
import re

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s:#]+)(#[^)]*)?\)")


def on_page_markdown(markdown, page, config, files):
    """Rewrites the links of a page that lead out of docs/. MkDocs calls it for each page."""
    folder = posixpath.dirname(page.file.src_uri)

    def rewritten(match):
        path = posixpath.normpath(posixpath.join(folder, match[2]))
        if not path.startswith("../"):
            return match[0]
        repository = config.repo_url
        return f"[{match[1]}]({repository}/blob/main/{path[3:]})" if repository else match[1]

    return _LINK.sub(rewritten, markdown)
