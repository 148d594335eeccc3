#!/usr/bin/env bash
# Every result of this folder, stage by stage (README.md); what is done (but `rollouts`, `values`) is not done again.
set -euo pipefail
cd "$(dirname "$0")/.."

train() {                               # train FOLDER FLAGS...
    local out=$1; shift
    [ -f "$out/summary.json" ] || python train.py --out "$out" "$@" $([ -f "$out/config.json" ] && echo --resume)
}

runs=(runs/calculator-seed{0,1,2})
for s in 0 1 2; do train "runs/calculator-seed$s" --quota none --seed "$s"; done
python -m minipav.paper.report --runs "${runs[@]}" --out results/train
python search.py --run "${runs[@]}" --all --out results/search
python -m minipav.paper.mechanism --run "${runs[@]}" --noise --out results/mechanism
python -m minipav.paper.mechanism --run "${runs[@]}" --width 8 --quotas none --validation 200 \
    --verifiers base-30 base-60 --out results/mechanism_w8
python -m results.mechanism_provers.provers "${runs[@]}"
python search.py --run "${runs[@]}" --verifier mechanism/base-60 --all --out results/search_weak
python search.py --run "${runs[@]}" --verifier mechanism/base-60 --spread 0 --quota none --widths 4 8 16 \
    --search pass beam:q_pi beam:effective --out results/search_weak_spread0
python rl.py --run "${runs[@]}" --iterations 240 --eval_every 5 --out results/rl
python rl.py --run "${runs[@]}" --iterations 480 --eval_every 5 --out results/rl_480

python search.py --run "${runs[@]}" --widths 1 2 4 8 16 --out results/search_relatives --search greedy pass best_of_n:orm \
    beam:q_pi beam:effective dvts backtrack backtrack:effective mcts puct mcts_quality
python rl.py --run "${runs[@]}" --iterations 240 --eval_every 5 --out results/rl_relatives \
    --reward outcome pav grpo abc uniform dpo selftrain
python -m minipav.paper.mechanism --run "${runs[@]}" --out results/mechanism_targets \
    --verifiers base-250 base-250-seer base-250-in_support base-250-dre
python rl.py --run "${runs[@]}" --iterations 240 --eval_every 5 --reward grpo --kl 0.1 --out results/rl_relatives_grpo

narrow=(runs/narrow-seed{0,1,2})
for s in 0 1 2; do train "runs/narrow-seed$s" --H 12 --min_steps 9 --skew 2 --seed "$s"; done
python -m minipav.paper.report --runs "${narrow[@]}" --out results/train_narrow
python rl.py --run "${narrow[@]}" --iterations 240 --eval_every 5 --reward outcome pav pav_exact --out results/rl_narrow
for alpha_kl in "3 0.078" "5 0.126"; do          # the KL scaled with the reward
    read -r alpha kl <<< "$alpha_kl"
    python rl.py --run "${narrow[@]}" --iterations 240 --eval_every 5 --reward pav pav_exact --alpha "$alpha" --kl "$kl" \
        --out "results/rl_narrow_alpha$alpha"
done
python rl.py --run "${narrow[@]}" --iterations 480 --eval_every 5 --reward outcome pav pav_exact --no_control \
    --out results/rl_narrow_480

expert=(runs/expert-seed{0,1,2}) long=(runs/expert_long-seed{0,1,2}) more=(runs/expert_more-seed{0,1,2})
flags="--expert_fraction 1 --strong_steps 0 --prover_rollouts 0"
for s in 0 1 2; do
    train "runs/expert-seed$s" $flags --seed "$s"
    train "runs/expert_long-seed$s" $flags --q_steps 2400 --seed "$s"
    train "runs/expert_more-seed$s" $flags --problems 40000 --branches 160000 --q_steps 4800 --seed "$s"
    python -m results.search_expert.values "runs/expert-seed$s" "runs/expert_long-seed$s" "runs/expert_more-seed$s"
done
python search.py --run "${expert[@]}" --out results/search_expert
python search.py --run "${long[@]}" --out results/search_expert_long
python search.py --run "${more[@]}" --out results/search_expert_more
python -m results.search_expert.rollouts "${expert[@]}"
python -m results.search_expert.rollouts "${more[@]}"
python rl.py --run "${expert[@]}" --iterations 240 --eval_every 5 --out results/rl_expert
python rl.py --run "${more[@]}" --iterations 240 --eval_every 5 --out results/rl_expert_more

countdown=(runs/countdown-seed{0,1,2})
for s in 0 1 2; do train "runs/countdown-seed$s" --task countdown --seed "$s"; done
python -m minipav.paper.report --runs "${countdown[@]}" --out results/train_countdown
python search.py --run "${countdown[@]}" --out results/search_countdown
python -m minipav.paper.mechanism --run "${countdown[@]}" --out results/mechanism_countdown \
    --verifiers base-30 base-60 base-120 base-120-seed1 base-150-1000traces q_pi
python rl.py --run "${countdown[@]}" --iterations 240 --eval_every 5 --out results/rl_countdown
python search.py --run "${countdown[@]}" --widths 1 2 4 8 --out results/search_relatives_countdown --search greedy pass \
    best_of_n:orm beam:q_pi beam:effective dvts backtrack backtrack:effective mcts puct mcts_quality
python rl.py --run "${countdown[@]}" --iterations 240 --eval_every 5 --out results/rl_relatives_countdown \
    --reward outcome pav grpo abc uniform dpo selftrain
python rl.py --run "${countdown[@]}" --iterations 240 --eval_every 5 --reward dpo --lr 0.0001 \
    --out results/rl_relatives_countdown_dpo

python -m minipav.paper.didactic --seeds 10 --all --out results/didactic
python -m minipav.paper.theory --out results/didactic
python -m minipav.paper.report --collect results
