"""Chat templates: the named ones, the one that most models have, and the files they stand in."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from typing import Any  # What JSON holds.

from jaxmerge.io.huggingface import vocabulary
from jaxmerge.io.huggingface.vocabulary import JINJA, JSON, SETTINGS, TokenizerFiles

_KEY = "chat_template"

# Written from the formats' descriptions. Texts stand in expressions, so that it does not matter how
# a program treats line breaks beside Jinja's tags.
TEMPLATES = {
  "alpaca": """\
{%- set found = namespace(system='Below is an instruction that describes a task. \
Write a response that appropriately completes the request.') -%}
{%- for turn in messages if turn.role == 'system' -%}
{%- set found.system = turn.content | trim -%}
{%- endfor -%}
{{- bos_token + found.system + '\\n\\n' -}}
{%- for turn in messages -%}
{%- if turn.role == 'user' -%}
{{- '### Instruction:\\n' + turn.content | trim + '\\n\\n' -}}
{%- elif turn.role == 'assistant' -%}
{{- '### Response:\\n' + turn.content | trim + eos_token + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '### Response:\\n' -}}
{%- endif -%}
""",
  "chatml": """\
{%- for turn in messages -%}
{{- '<|im_start|>' + turn.role + '\\n' + turn.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""",
  "llama3": """\
{{- bos_token -}}
{%- for turn in messages -%}
{{- '<|start_header_id|>' + turn.role + '<|end_header_id|>\\n\\n' -}}
{{- turn.content | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
""",
  "mistral": """\
{{- bos_token -}}
{%- set before = namespace(text='') -%}
{%- for turn in messages -%}
{%- if turn.role == 'system' -%}
{%- set before.text = turn.content | trim + '\\n\\n' -%}
{%- elif turn.role == 'user' -%}
{{- '[INST] ' + before.text + turn.content | trim + ' [/INST]' -}}
{%- set before.text = '' -%}
{%- else -%}
{{- ' ' + turn.content | trim + eos_token -}}
{%- endif -%}
{%- endfor -%}
""",
  "exaone": """\
{%- if messages[0].role != 'system' -%}
{{- '[|system|][|endofturn|]\\n' -}}
{%- endif -%}
{%- for turn in messages -%}
{{- '[|' + turn.role + '|]' + turn.content -}}
{{- '\\n' if turn.role == 'user' else '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '[|assistant|]' -}}
{%- endif -%}
""",
}


def chosen(said: str, models: Iterable[TokenizerFiles]) -> str | None:
  """Returns the Jinja text of what a recipe says; None for `auto` where no model has a template.

  `auto` is the template that most models have; of equally frequent ones, that of the first.
  """
  if said != "auto":
    return TEMPLATES.get(said, said)
  found = collections.Counter(own.strip() for papers in models if (own := _own(papers)))
  return found.most_common(1)[0][0] if found else None


def _own(papers: TokenizerFiles) -> str | None:
  """Returns a model's template: the file of it counts before the one among the settings."""
  if (text := papers.text(JINJA)) is not None:
    return text
  for name in (JSON, SETTINGS):
    found: Any = papers.json(name).get(_KEY)
    if isinstance(found, list):  # Several, each with a name.
      found = {entry.get("name"): entry.get("template") for entry in found}.get("default")
    if isinstance(found, str) and found:
      return found
  return None


def texts(template: str, papers: TokenizerFiles, settings: str | None = None) -> dict[str, str]:
  """Returns the files of a model that hold the template, by name, with another one in them.

  Args:
    template: the Jinja text.
    papers: the files that are changed.
    settings: text of tokenizer_config.json, if it is another one.
  """
  if settings is None:
    settings = papers.text(SETTINGS) or "{}"
  made = {SETTINGS: vocabulary.text({**json.loads(settings), _KEY: template})}
  if papers.has(JINJA):
    made[JINJA] = template
  if papers.has(JSON):
    made[JSON] = vocabulary.text({_KEY: template})
  return made
