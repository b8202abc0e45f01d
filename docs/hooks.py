"""Hooks of mkdocs: links out of docs/ become the names of files in the repository."""

import re


def on_page_markdown(markdown: str, page, **_) -> str:
  if '/' in page.file.src_uri:
    return markdown
  return re.sub(r'\[([^\]]+)\]\(\.\./([^)#]+)[^)]*\)', r'\1 (`\2`)', markdown)
