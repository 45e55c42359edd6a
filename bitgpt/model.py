"""The ternary GPT (BitNet b1.58): gpt/model.py with BitLinear for nn.Linear. Embedding, head and norms stay fp32."""

from torch import Tensor

from bitgpt.bitlinear import BitLinear, quantize_weight
from core.runtime import whole
from gpt.model import GPT


class BitGPT(GPT):
    name = "bitgpt"
    linear = BitLinear

    def trits(self) -> dict[str, Tensor]:
        """The ternary weights by name, int8 (N, K)."""
        return {f"{name}.weight": quantize_weight(whole(module.weight.detach()))[0]
                for name, module in self.named_modules() if isinstance(module, BitLinear)}
