// THE training loop. Environment in, `step N: loss=V` lines out, files under the run directory; see train_main() at the end.
#include "loop.h"

#include "archs/lora.h"
#include "engine/checkpoint.h"
#include "engine/device.h"
#include "engine/error.h"
#include "engine/events.h"
#include "engine/files.h"
#include "engine/process.h"
#include "profile.h"
#include "session.h"

#include <algorithm>
#include <cmath>
#include <new>

namespace toy {

struct run_env {
    std::string run_dir, run_id, recipe, tokenizer, datasets;
    config      cfg;
};

// What the run knows at its end, for the last event.
struct run_summary {
    const char * reason            = "failed";
    float        loss              = NAN;
    double       val_loss          = NAN;
    double       accuracy          = NAN;
    double       tokens_per_second = NAN;
    double       started           = monotonic_time();
    int64_t      step              = 0;
    train_state  state;
    std::string  gguf, checkpoint, bad_tensor;
};

static std::string need_env(const char * key) {
    const std::string v = env(key);
    if (v.empty()) {
        throw error("bad_flag", EXIT_BAD_INPUT, format("%s is not in the environment", key), "runners are started by `toy train`");
    }
    return v;
}

static run_env read_env(const std::string & arch, const std::vector<std::string> & recipes) {
    run_env e;
    e.run_dir   = need_env("TOY_RUN_DIR");
    e.run_id    = need_env("TOY_RUN_ID");
    e.recipe    = need_env("RECIPE");
    e.tokenizer = env("TOKENIZER");
    e.datasets  = env("DATASETS");
    e.cfg       = config::load(need_env("TOY_CONFIG"));
    if (atoll(need_env("STEPS").c_str()) != e.cfg.train.steps || atoll(need_env("SEED").c_str()) != e.cfg.run.seed || e.cfg.run.recipe != e.recipe) {
        throw error("bad_config", EXIT_BAD_INPUT, "STEPS, SEED or RECIPE differ from config.kv", "runners are started by `toy train`");
    }
    if (std::find(recipes.begin(), recipes.end(), e.recipe) == recipes.end() || e.cfg.run.arch != arch) {
        throw error("not_available", EXIT_BAD_INPUT, format("this runner does not train recipe %s with %s", e.recipe.c_str(), e.cfg.run.arch.c_str()),
                    "runners are started by `toy train`");
    }
    // where each part of the recipe must be given
    need_env(e.recipe == "vit-tiny" ? "IMG_DIR" : "CORPUS");
    if (e.recipe == "lora" || (e.recipe == "warm-start" && e.cfg.model.init != "scratch")) {
        need_env("GGUF");
    }
    return e;
}

static std::string memory_json(const memory_plan & m) {
    return json_object()
        .num("weights", m.weights)
        .num("gradients", m.gradients)
        .num("moments", m.moments)
        .num("compute", m.compute)
        .num("inputs", m.inputs)
        .num("work", m.work)
        .num("base", m.base)
        .num("corpus", m.corpus)
        .num("runtime", m.runtime)
        .num("total", m.total())
        .done();
}

// The model, or the adapter alone. Returns its path.
static std::string write_gguf(const run_env & env, const session & s) {
    gguf_writer out;
    if (!env.tokenizer.empty() && !s.base) {
        const gguf_file tokenizer(env.tokenizer);
        out.copy_metadata(tokenizer);
    }
    s.base ? write_lora_metadata(s.cfg, s.hp, out) : s.model.write_metadata(s.hp, out);
    out.set_str("general.name", env.cfg.run.name.empty() ? env.run_id : env.cfg.run.name);
    out.set_u32("general.file_type", 0);   // all F32
    out.set_str("toy.run_id", env.run_id);
    out.set_u64("toy.step", s.steps_done);
    if (s.base) {
        const size_t at = env.datasets.find("base=");
        out.set_str("toy.lora.base_sha256", at == std::string::npos ? "" : env.datasets.substr(at + 5, env.datasets.find(',', at) - at - 5));
    }
    for (const param & p : s.w.params) {
        out.add_tensor(p.w, p.name);
    }
    const std::string path = env.run_dir + (s.base ? "/weights/adapter.gguf" : "/weights/model.gguf");
    make_dir(env.run_dir + "/weights");
    out.write(path);
    return path;
}

static void write_run_start(events_writer & events, const run_env & env, const session & s) {
    events.write(events.begin("run_start")
                     .str("run_id", env.run_id)
                     .str("recipe", env.recipe)
                     .str("arch", s.hp.arch)
                     .str("device", env.cfg.run.device)
                     .num("steps", env.cfg.train.steps)
                     .num("seed", env.cfg.run.seed)
                     .num("parameters", s.w.n_params(false))
                     .num("total_parameters", s.total_params())
                     .str("items", s.is_vision() ? "images" : "tokens")
                     .num("tokens_per_step", s.tokens_per_step())
                     .num("train_sequences", s.n_train())
                     .num("val_sequences", s.n_val())
                     .num("train_tokens", s.train_tokens)
                     .num("val_tokens", s.val_tokens)
                     .num("threads", env.cfg.run.threads)
                     .raw("memory", memory_json(s.memory(s.corpus_bytes()))));
}

static void write_run_end(events_writer & events, const run_summary & sum, const error * err) {
    json_object e = events.begin("run_end");
    e.str("reason", sum.reason).num("step", sum.step).num("final_loss", sum.loss).num("val_loss", sum.val_loss).num("accuracy", sum.accuracy);
    sum.state.best_step > 0 ? e.num("best_val_loss", sum.state.best_val_loss).num("best_step", sum.state.best_step)
                            : e.null("best_val_loss").null("best_step");
    e.num("tokens_per_second", sum.tokens_per_second).num("seconds", monotonic_time() - sum.started).num("peak_rss_bytes", peak_resident_bytes());
    sum.gguf.empty() ? e.null("gguf") : e.str("gguf", sum.gguf);
    sum.checkpoint.empty() ? e.null("checkpoint") : e.str("checkpoint", sum.checkpoint);
    if (err) {
        json_object j;
        j.str("kind", err->kind).str("message", err->what()).str("hint", err->hint);
        if (!sum.bad_tensor.empty()) {
            j.str("tensor", sum.bad_tensor);
        }
        e.raw("error", j.done());
    } else {
        e.null("error");
    }
    events.write(e.null("quality_gate"));
}

static bool is_due(int every, int64_t step) {
    return every > 0 && step % every == 0;
}

// The loop itself: every optimizer step of the run, in order, and what is due after it.
static void train(const run_env & env, session & s, events_writer & events, run_summary & sum) {
    const config & cfg   = env.cfg;
    checkpoints    saved = { env.run_dir + "/checkpoints", env.datasets };
    make_dir(saved.dir);

    const auto save_checkpoint = [&]() {
        sum.state.step = s.steps_done;
        sum.state.data = s.reader->tell();
        sum.checkpoint = saved.save(cfg, s.w, sum.state);
        events.write(events.begin("checkpoint").num("step", s.steps_done).str("path", sum.checkpoint));
        saved.prune(cfg, sum.state.best_step);
    };
    const auto evaluate = [&]() {
        const eval_result e = s.evaluate();
        if (e.n_labels == 0) {
            return;
        }
        sum.val_loss               = e.loss;
        sum.accuracy               = e.accuracy;
        const bool best            = e.loss < sum.state.best_val_loss;
        sum.state.evals_since_best = best ? 0 : sum.state.evals_since_best + 1;
        sum.state.last_eval_step   = s.steps_done;
        if (best) {
            sum.state.best_val_loss = e.loss;
            sum.state.best_step     = s.steps_done;
        }
        events.write(events.begin("eval")
                         .num("step", s.steps_done)
                         .num("val_loss", e.loss)
                         .num("accuracy", e.accuracy)
                         .num("tokens", e.n_labels)
                         .flag("best", best));
        if (best && cfg.checkpoint.keep_best) {
            if (!saved.has(s.steps_done)) {
                save_checkpoint();
            }
            saved.mark_best(s.steps_done);
        }
    };
    const auto out_of_patience = [&]() { return cfg.eval.patience > 0 && sum.state.evals_since_best >= cfg.eval.patience; };
    const auto eval_due        = [&]() { return is_due(cfg.eval.every, s.steps_done) || s.steps_done >= cfg.train.steps; };
    const auto out_of_time     = [&]() { return cfg.run.stop_after > 0 && monotonic_time() - sum.started >= cfg.run.stop_after; };

    profiler      profile(cfg, s.be, *s.reader);   // of the first steps, if log.profile asks for it
    double        busy  = 0;                       // seconds inside steps: evaluations and saves do not count as training speed
    int64_t       seen  = 0;                       // tokens
    const int64_t first = s.steps_done;
    if (first > 0 && eval_due() && sum.state.last_eval_step < first) {
        evaluate();   // the checkpoint was written before the evaluation of its step
    }
    bool early_stop = first > 0 && out_of_patience(), timed_out = false;
    while (s.steps_done < cfg.train.steps && !early_stop && !stop_requested() && !timed_out) {
        profile.begin_step(cfg.train.steps - s.steps_done);
        const double      t0 = monotonic_time();
        const step_result r  = s.step();
        const double      dt = monotonic_time() - t0;
        profile.end_step(dt);
        busy += dt;
        seen += r.n_tokens;

        if (!r.bad_tensor.empty()) {
            sum.reason     = "non_finite";
            sum.bad_tensor = r.bad_tensor;
            save_checkpoint();
            sum.gguf = write_gguf(env, s);
            throw error("non_finite", EXIT_FAILED,
                        format("step %lld: the %s is not finite; first bad tensor: %s", (long long) s.steps_done + 1,
                               std::isfinite(r.loss) ? "gradient" : "loss", r.bad_tensor.c_str()),
                        format("the weights of step %lld are kept; lower train.learning_rate, or set train.grad_clip", (long long) s.steps_done));
        }

        sum.step              = s.steps_done;
        sum.loss              = r.loss;
        sum.tokens_per_second = (double) seen / busy;
        say(format("step %lld: loss=%s", (long long) s.steps_done, shortest(r.loss).c_str()));
        const bool last = s.steps_done >= cfg.train.steps;
        timed_out       = !last && out_of_time();
        if (is_due(cfg.log.every, s.steps_done) || last) {
            events.write(events.begin("step")
                             .num("step", s.steps_done)
                             .num("loss", r.loss)
                             .num("learning_rate", r.learning_rate)
                             .num("grad_norm", r.grad_norm)
                             .num("tokens_per_second", (double) r.n_tokens / dt)
                             .num("sequences_per_second", cfg.train.batch / dt)
                             .num("tokens", s.steps_done * s.tokens_per_step())
                             .num("epoch", (int64_t) s.reader->tell().epoch)
                             .num("rss_bytes", resident_bytes()));
        }

        // saving comes before evaluating, so that an evaluation that dies costs nothing
        const bool stopping = stop_requested() || timed_out;
        if (is_due(cfg.checkpoint.every, s.steps_done) || is_due(cfg.checkpoint.keep_every, s.steps_done) || last || stopping) {
            save_checkpoint();
        }
        if (eval_due() && !stopping) {
            evaluate();
            if (!last && out_of_patience()) {
                save_checkpoint();
                early_stop = true;
            }
        }
    }
    sum.step = s.steps_done;
    if (stop_requested() && !saved.has(s.steps_done)) {
        save_checkpoint();   // stopped before the first step
    }
    if (profile.has_result()) {
        json_object event = events.begin("profile");
        profile.write(event);
        events.write(event);
    }
    saved.prune(cfg, sum.state.best_step);
    sum.gguf   = write_gguf(env, s);
    sum.reason = s.steps_done >= cfg.train.steps ? "done" : early_stop ? "early_stop" : timed_out ? "stop_after" : "interrupted";
}

static int run(const run_env & env) {
    events_writer events(env.run_dir + "/events.jsonl");
    run_summary   sum;
    try {
        const inputs_lookup inputs = [](const char * key) { return toy::env(key); };
        session             s(env.cfg, inputs);
        s.set_data(inputs);
        if (const std::string left = s.left_to_cpu(); !left.empty()) {
            fprintf(stderr, "note: %s lacks operations of this step, which the cpu computes: %s\n", DEVICE, left.c_str());
        }
        if (env.cfg.checkpoint.resume.empty()) {
            s.start_weights(inputs);
        } else {
            sum.state    = checkpoints::load(env.cfg.checkpoint.resume, env.cfg, env.datasets, s.w);
            s.steps_done = sum.state.step;
            s.reader->seek(sum.state.data);
        }
        write_run_start(events, env, s);
        train(env, s, events, sum);
    } catch (const error & e) {
        write_run_end(events, sum, &e);
        throw;
    } catch (const std::bad_alloc &) {
        const error e("oom", EXIT_FAILED, "out of memory", LOWER_STEP);
        write_run_end(events, sum, &e);
        throw e;
    } catch (const std::exception & lost) {
        // a driver: a GPU that was reset, or taken away
        const error e("runner_failed", EXIT_FAILED, format("the %s device failed: %s", DEVICE, lost.what()),
                      "checkpoints are kept: `toy train --resume` goes on from the last one");
        write_run_end(events, sum, &e);
        throw e;
    }
    write_run_end(events, sum, nullptr);
    const std::string reason = sum.reason;
    return reason == "interrupted" || reason == "stop_after" ? EXIT_INTERRUPTED : EXIT_DONE;
}

int train_main(const std::string & arch, const std::vector<std::string> & recipes) {
    return runner_main([&]() { return run(read_env(arch, recipes)); });
}

}   // namespace toy
