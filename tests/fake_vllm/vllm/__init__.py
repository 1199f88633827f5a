"""What lm-eval uses of vLLM, answered by transformers and PEFT: the real one wants a GPU."""

import json
import os
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

TokensPrompt = dict
SamplingParams = SimpleNamespace


class LLM:
    def __init__(self, model, dtype, **settings):
        with open(os.environ["FAKE_VLLM_TOLD"], "w") as file:
            json.dump(settings | {"dtype": dtype}, file, default=str)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        most = self.model.config.max_position_embeddings
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=most))
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def generate(self, prompts, sampling_params, use_tqdm, lora_request):
        model = PeftModel.from_pretrained(self.model, lora_request.path).eval()
        return [
            self._answer(model, torch.tensor([prompt["prompt_token_ids"]]), params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]

    def _answer(self, model, ids, params):
        assert params.temperature == 0
        done = model.generate(ids, max_new_tokens=params.max_tokens, do_sample=False)
        text = self.tokenizer.decode(done[0, ids.shape[1] :], skip_special_tokens=True)
        for stop in params.stop:
            text = text.split(stop)[0]
        return SimpleNamespace(outputs=[SimpleNamespace(text=text)])
