"Tiny random models of many architectures that transformers knows."

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 64
WINDOW = 6  # of attention that looks back only so far

_common = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=64,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_windows = dict(sliding_window=WINDOW, layer_types=['sliding_attention', 'full_attention'])
_experts = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
_mamba = dict(mamba_d_state=8, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_chunk_size=8)
_linear_attention = dict(
    linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8
)

shapes = {
    'afmoe': _experts | _windows,
    'bamba': _mamba | dict(attn_layer_indices=[1]),
    'biogpt': {},
    'bitnet': {},
    'bloom': {},
    'codegen': dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    'cohere': {},
    'cohere2': _windows,
    'deepseek_v3': _experts | dict(
        n_routed_experts=4, n_group=1, topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1, num_key_value_heads=4, n_shared_experts=1),
    'diffllama': {},
    'exaone': {},
    'falcon': dict(alibi=False),
    'falcon_alibi': dict(model_type='falcon', alibi=True),
    'falcon_h1': _mamba | dict(mamba_d_ssm=64),
    'gemma': dict(head_dim=8),
    'gemma2': dict(head_dim=8, query_pre_attn_scalar=8) | _windows,
    'gemma3_text': dict(head_dim=8, query_pre_attn_scalar=8) | _windows,
    'glm': dict(head_dim=8),
    'gpt2': dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    'gpt_neo': dict(num_layers=2, num_heads=4, attention_types=[[['global', 'local'], 1]], window_size=WINDOW),
    'gpt_neox': {},
    'gpt_oss': dict(head_dim=8) | _experts | _windows,
    'gptj': dict(n_embd=32, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    'granite': dict(logits_scaling=4.0),
    'granitemoehybrid': _mamba | _experts | dict(
        layer_types=['mamba', 'attention'], shared_intermediate_size=32, logits_scaling=4.0),
    'helium': dict(head_dim=8),
    'jamba': _experts | dict(
        attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8, mamba_dt_rank=4),
    'lfm2': dict(layer_types=['conv', 'full_attention'], block_multiple_of=16),
    'llama': {},
    'mamba': dict(state_size=8),
    'mamba2': dict(state_size=8, num_heads=8, head_dim=8, n_groups=1, chunk_size=8),
    'minimax': _experts | dict(head_dim=8, layer_types=['linear_attention', 'full_attention'], block_size=8),
    'mistral': dict(sliding_window=WINDOW),
    'mixtral': _experts,
    'mpt': dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    'nemotron': {},
    'nemotron_h': _mamba | dict(
        head_dim=8, layers_block_type=['mamba', 'attention'], ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16,
        n_groups=1, chunk_size=8),
    'olmo': {},
    'olmo2': {},
    'olmo3': _windows,
    'olmoe': _experts,
    'opt': dict(ffn_dim=64, word_embed_proj_dim=32),
    'persimmon': {},
    'phi': {},
    'phi3': dict(pad_token_id=0),
    'qwen2': {},
    'qwen2_moe': _experts | dict(shared_expert_intermediate_size=32),
    'qwen3': dict(head_dim=8),
    'qwen3_next': dict(head_dim=8, layer_types=['linear_attention', 'full_attention'],
                       shared_expert_intermediate_size=32) | _experts | _linear_attention,
    'recurrent_gemma': dict(lru_width=32, attention_window_size=WINDOW, block_types=['recurrent', 'attention'],
                            num_hidden_layers=2),
    'rwkv': dict(attention_hidden_size=32),
    'smollm3': {},
    'stablelm': {},
    'starcoder2': {},
    'xglm': dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
    'zamba2': _mamba | dict(layers_block_type=['mamba', 'hybrid'], num_key_value_heads=4, mamba_ngroups=1,
                            mamba_headdim=16, n_mamba_heads=4, chunk_size=8, num_mem_blocks=1,
                            hybrid_layer_ids=[1]),
}

def attentions_that_keep_apart(name):
    "The forms of attention under which the model called `name` may read packed rows."
    return next((forms for forms, names in _apart.items() if name in names.split()), 'documents sdpa eager').split()


_apart = {
    'sdpa eager': 'falcon falcon_alibi nemotron stablelm',
    'eager': 'gemma2 gpt_neo',
    'documents': 'afmoe opt',
    '': 'bamba biogpt bloom falcon_h1 gpt_oss granitemoehybrid jamba lfm2 mamba mamba2 minimax mpt nemotron_h qwen3_next '
        'recurrent_gemma rwkv xglm zamba2',
}


def configuration(name):
    "The configuration of the tiny model called `name`."
    shape = _common | dict(model_type=name) | shapes[name]
    return AutoConfig.for_model(**shape)


def tiny_model(name, spread=0.15):
    "Random weights, matrices with a standard deviation of `spread`, so that a leak is seen; without dropout."
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape) * spread)
    return model
