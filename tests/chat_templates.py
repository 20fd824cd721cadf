"""Chat templates in the published form of seven families, written down from what they print, and a tokenizer for each.

A template is told `messages`, `tools` and `add_generation_prompt`. What makes these hard: a system turn that nobody
gave (Qwen2.5, SmolLM2), thinking that is dropped from earlier answers (Qwen3), other names of roles and trimmed contents
(Gemma 3), a system prompt and tools that move to the last question (Mistral), tools in the first question (Llama 3.1).
"""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

_answer_header = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

chatml = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    + _answer_header
)

smollm2 = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
) + chatml

_qwen_tools = (
    "{{ '\n\n' }}# Tools\n\n<tools>{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n' }}</tools>"
)
_qwen_calls = (
    "{% for call in m.tool_calls %}{{ '\n' }}<tool_call>\n"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}\n</tool_call>{% endfor %}"
)
_qwen_tool_result = (
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}"
    "{{ '\n' }}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>\n{% endif %}"
)

qwen2_5 = (
    "<|im_start|>system\n"
    "{{ messages[0].content if messages[0].role == 'system' else"
    " 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}"
    "{% if tools %}" + _qwen_tools + "{% endif %}<|im_end|>\n"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant{% if m.content %}{{ '\n' }}{{ m.content }}{% endif %}"
    + _qwen_calls + "<|im_end|>\n" + _qwen_tool_result + "{% endif %}{% endfor %}" + _answer_header
)

qwen3 = (
    "{% if tools or messages[0].role == 'system' %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% if tools %}" + _qwen_tools + "{% endif %}<|im_end|>\n{% endif %}"
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}{% set said = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought }}\n</think>\n\n{{ said }}{% else %}{{ said }}{% endif %}"
    + _qwen_calls + "<|im_end|>\n" + _qwen_tool_result + "{% endif %}{% endfor %}" + _answer_header
)

llama3_1 = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Cutting Knowledge Date: December 2023\nToday Date: {{ date_string or strftime_now('%d %b %Y') }}\n\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>"
    "{% for m in messages %}{% if m.role == 'user' %}<|start_header_id|>user<|end_header_id|>\n\n"
    "{% if tools and (loop.first or messages[loop.index0 - 1].role == 'system') %}"
    "Given the following functions, please respond with a JSON for a function call.\n\n"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}{% endif %}{{ m.content | trim }}<|eot_id|>"
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.role == 'assistant' %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    "{% if m.tool_calls %}{% set called = m.tool_calls[0].function %}"
    "{\"name\": \"{{ called.name }}\", \"parameters\": {{ called.arguments | tojson }}}"
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

gemma3 = (
    "{{ bos_token }}{% set first = '' %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% if loop.first %}{{ first }}{% endif %}"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)

mistral = (
    "{{ bos_token }}{% set system = '' %}{% if messages[0].role == 'system' %}"
    "{% set system = messages[0].content %}{% set messages = messages[1:] %}{% endif %}"
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and loop.index0 == ns.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS] {{ {'content': m.content} | tojson }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS] {{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)

_qwen_tokens = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']
_qwen_plain = ['<tool_call>', '</tool_call>', '<tool_response>', '</tool_response>', '<think>', '</think>']
_mistral_tokens = ['[INST]', '[/INST]', '[AVAILABLE_TOOLS]', '[/AVAILABLE_TOOLS]', '[TOOL_CALLS]', '[TOOL_RESULTS]',
                   '[/TOOL_RESULTS]']
_llama_tokens = ['<|begin_of_text|>', '<|end_of_text|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>',
                 '<|eom_id|>', '<|python_tag|>']

_families = dict(  # family -> (template, special tokens, other added ones, first and last token of a text)
    chatml=(chatml, _qwen_tokens, [], '<|endoftext|>', '<|im_end|>'),
    smollm2=(smollm2, _qwen_tokens, [], '<|im_start|>', '<|im_end|>'),
    qwen2_5=(qwen2_5, _qwen_tokens, _qwen_plain[:4], None, '<|im_end|>'),
    qwen3=(qwen3, _qwen_tokens, _qwen_plain, None, '<|im_end|>'),
    llama3_1=(llama3_1, _llama_tokens, [], '<|begin_of_text|>', '<|eot_id|>'),
    gemma3=(gemma3, ['<bos>', '<eos>', '<start_of_turn>', '<end_of_turn>'], [], '<bos>', '<eos>'),
    mistral=(mistral, ['<s>', '</s>', *_mistral_tokens], [], '<s>', '</s>'),
)
families = tuple(_families)
with_tools = ('qwen2_5', 'qwen3', 'llama3_1', 'mistral')
with_tags = chatml.replace("+ m.content + '<|im_end|>' + '\n' }}", "}}{% if m.role == 'assistant' %}{% generation %}"
                           "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
                           "{% endif %}{{ '\n' }}")


def byte_tokenizer(special, plain=(), **options):
    "A byte-level tokenizer with these added tokens and hardly a merge."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [('Ċ', 'Ċ'), ('Ġ', 'a'), ('<', '|')]
    words = [*alphabet, *map(''.join, merges)]
    raw = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(token, special=True) for token in special])
    raw.add_tokens([AddedToken(token, special=False) for token in plain])
    return PreTrainedTokenizerFast(tokenizer_object=raw, clean_up_tokenization_spaces=False, **options)


def family_tokenizer(family, template=None):
    "A tokenizer with the special tokens and the template of a family, or with another template."
    own, special, plain, first, last = _families[family]
    options = dict(bos_token=first) if first else {}
    return byte_tokenizer(special, plain, eos_token=last, pad_token=last, chat_template=template or own, **options)
