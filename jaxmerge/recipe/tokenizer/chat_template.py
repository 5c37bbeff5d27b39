"""Chat templates: the built-in ones, the most frequent one of the models, and their files."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from typing import Any  # Values of JSON.

from jaxmerge.io.huggingface import vocabulary
from jaxmerge.io.huggingface.vocabulary import JINJA, JSON, SETTINGS, TokenizerFiles

_KEY = "chat_template"

# Written from the formats' descriptions. Text is inside expressions, so that a program's treatment
# of line breaks around Jinja tags does not matter.
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


def choose(choice: str, models: Iterable[TokenizerFiles]) -> str | None:
  """Returns the Jinja text that a recipe chooses; None for `auto` where no model has a template.

  `auto` is the most frequent template of the models; of equally frequent ones, the first.
  """
  if choice != "auto":
    return TEMPLATES.get(choice, choice)
  counts = collections.Counter(
    template.strip() for files in models if (template := _template_of(files))
  )
  return counts.most_common(1)[0][0] if counts else None


def _template_of(files: TokenizerFiles) -> str | None:
  """Returns a model's template: a template file takes precedence over the tokenizer's settings."""
  if (text := files.text(JINJA)) is not None:
    return text
  for name in (JSON, SETTINGS):
    template: Any = files.json(name).get(_KEY)
    if isinstance(template, list):  # Several named templates.
      template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if isinstance(template, str) and template:
      return template
  return None


def texts(template: str, files: TokenizerFiles, settings: str | None = None) -> dict[str, str]:
  """Returns the files that store a model's template, by name, with a new template in them.

  Args:
    template: the new Jinja text.
    files: the files to change.
    settings: text of tokenizer_config.json, where it differs from that of `files`.
  """
  if settings is None:
    settings = files.text(SETTINGS) or "{}"
  by_name = {SETTINGS: vocabulary.text({**json.loads(settings), _KEY: template})}
  if files.has(JINJA):
    by_name[JINJA] = template
  if files.has(JSON):
    by_name[JSON] = vocabulary.text({_KEY: template})
  return by_name
