"""Chat templates with the features of the families' own: their roles, their control tokens, what they refuse."""

from __future__ import annotations

# No system turns, strict turns of user and model, and BOS in front.
GEMMA2 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no turn may be a system turn') }}"
    "{% endif %}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must take turns') }}{% endif %}"
    "{% set name = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + name + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# The system's text in front of the first user's; contents are texts or parts, of which some are images.
GEMMA3 = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}{%- set turns = messages[1:] -%}"
    "{%- else -%}{%- set first, turns = '', messages -%}{%- endif -%}{%- for m in turns -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('must take turns') }}{%- endif -%}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '')"
    " }}{%- if m['content'] is string -%}{{ m['content'] | trim }}{%- else -%}{%- for part in m['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
# Two tokens in front, nothing after an answer, and an observation in place of a tool's answer.
GLM4 = (
    "[gMASK]<sop>{%- for m in messages %}{%- if m.role == 'system' %}{{ '<|system|>\n' + m.content }}"
    "{%- elif m.role == 'user' %}{{ '<|user|>\n' + m.content }}{%- elif m.role == 'assistant' %}"
    "{{ '<|assistant|>' + (m.metadata or '') + '\n' + m.content }}{%- elif m.role == 'observation' %}"
    "{{ '<|observation|>\n' + m.content }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)
# A system turn of its own where the conversation has none.
GRANITE = (
    "{%- if messages[0].role != 'system' %}{{ '<|start_of_role|>system<|end_of_role|>You help.' + eos_token + '\n' }}"
    "{%- endif %}{%- if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + tools | tojson + eos_token + '\n' }}"
    "{%- endif %}{%- for m in messages %}{%- if m.role == 'assistant' and m.tool_calls %}"
    "{{ '<|start_of_role|>assistant<|end_of_role|><|tool|>' + m.tool_calls[0].function.name }}{%- else %}"
    "{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content }}{%- endif %}{{ eos_token + '\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
)
# Tokens around the turns of user and system, and no space or line break.
MISTRAL_SMALL = (
    "{{ bos_token }}{%- for m in messages %}{%- if m.content is string %}{%- set text = m.content %}{%- else %}"
    "{%- set text = m.content[0].text %}{%- endif %}{%- if m.role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' + text + '[/SYSTEM_PROMPT]' }}{%- elif m.role == 'user' %}{{ '[INST]' + text + '[/INST]' }}"
    "{%- elif m.role == 'assistant' %}{{ text + eos_token }}{%- else %}{{ raise_exception('unknown ' + m.role) }}"
    "{%- endif %}{%- endfor %}"
)
# Roles that are no control tokens, and a line break after all answers but the last.
OLMO2 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% if not loop.last or m['role'] != 'assistant' %}"
    "{{ '\n' }}{% endif %}{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
# Texts of functions and of their calls, results from an environment, and another end of the last answer.
OLMO3 = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m['role'] + '\n' + (m['content'] or '') -}}"
    "{%- if m.get('functions', none) is not none -%}{{- ' <functions>' + m['functions'] + '</functions>' -}}"
    "{%- endif -%}{%- if m.get('function_calls', none) is not none -%}"
    "{{- '<function_calls>' + m['function_calls'] + '</function_calls>' -}}{%- endif -%}"
    "{%- if m['role'] == 'assistant' and loop.last -%}{{- eos_token -}}{%- elif m['role'] == 'environment' -%}"
    "{{- '<|turn|>\n' -}}{%- else -%}{{- '<|turn|>\n' -}}{%- endif -%}"
    "{%- if loop.last and add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}{%- endfor -%}"
)
CONTROL_TOKENS = [
    *("<start_of_turn>", "<end_of_turn>", "<image>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|observation|>", "<|start_of_role|>", "<|end_of_role|>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]"),
    *("[/INST]", "<|turn|>"),
]
