"""GGUF files of small Llamas with their tokenizer, as llama.cpp's converter writes them."""

import gguf
import numpy as np

names = dict(
    attn_q='self_attn.q_proj',
    attn_k='self_attn.k_proj',
    attn_v='self_attn.v_proj',
    attn_output='self_attn.o_proj',
    ffn_gate='mlp.gate_proj',
    ffn_up='mlp.up_proj',
    ffn_down='mlp.down_proj',
    attn_norm='input_layernorm',
    ffn_norm='post_attention_layernorm',
)


def interleaved(weight, heads):
    "Rows of a query or key matrix in the order of llama.cpp: the two halves of a head's width alternate."
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(model):
    "Name in a GGUF file -> float32 array, for a Llama of transformers."
    config = model.config
    state = {name: weight.detach().float().numpy() for name, weight in model.state_dict().items()}
    found = {'token_embd': state['model.embed_tokens.weight'], 'output_norm': state['model.norm.weight']}
    for layer in range(config.num_hidden_layers):
        for short, long in names.items():
            weight = state[f'model.layers.{layer}.{long}.weight']
            heads = dict(attn_q=config.num_attention_heads, attn_k=config.num_key_value_heads).get(short)
            found[f'blk.{layer}.{short}'] = interleaved(weight, heads) if heads else weight
    return found


def add_settings(writer, config):
    writer.add_name('small')
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters['rope_theta'])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)


def add_tokenizer(writer, tokenizer):
    import json

    model = json.loads(tokenizer.backend_tokenizer.to_str())['model']
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    kinds = [gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words]
    writer.add_tokenizer_model('gpt2')
    writer.add_tokenizer_pre('smollm')
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    writer.add_token_merges([pair if isinstance(pair, str) else ' '.join(pair) for pair in model['merges']])
    writer.add_bos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def write_gguf(path, model, tokenizer=None, packing=None, own_head=None):
    "Write `model` to `path`, its matrices in `packing` (a `GGMLQuantizationType`; float32 when None)."
    writer = gguf.GGUFWriter(str(path), 'llama')
    add_settings(writer, model.config)
    if tokenizer is not None:
        add_tokenizer(writer, tokenizer)
    tensors = tensors_of(model) | ({} if own_head is None else dict(output=own_head))
    for name, weight in tensors.items():
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        if packing is not None and weight.ndim == 2:
            writer.add_tensor(f'{name}.weight', gguf.quants.quantize(weight, packing), raw_dtype=packing)
        else:
            writer.add_tensor(f'{name}.weight', weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
