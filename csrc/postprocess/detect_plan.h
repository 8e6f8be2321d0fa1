// How the CUDA kernels of post-processing divide their work, and what their buffers take. Torch-free: tests read it too.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace retinanet_ext {

constexpr int64_t kDetectBufferBytes = int64_t{64} << 20;  // of all buffers, but for one a level and image
constexpr int64_t kFewestFreed = 1024;                     // beyond the wanted candidates, of a buffer that may overflow
constexpr int64_t kSelectLists = 64;                       // buffers that one block selects from, where there are more
constexpr int64_t kSelectRoom = 2048;                      // keys that it may leave, at least

struct LevelPlan {
  int64_t parts;       // of an image
  int64_t first_part;  // of the level
  int64_t capacity;    // keys of a part's buffer
  int64_t first_slot;  // of the level's buffers, in keys
  int64_t most;        // candidates that an image may keep of the level
  int64_t first;       // of these, among those of all levels
  // Of the launch that selects group by group, where a level has more parts than a group:
  int64_t groups;      // of an image
  int64_t first_group;  // of the level
  int64_t group_room;  // keys that a group may leave
  int64_t first_left;  // of the level's groups, in keys
};

struct DetectPlan {
  std::vector<LevelPlan> levels;
  int64_t part = 0;   // logits
  int64_t parts = 0;  // in all
  int64_t slots = 0;  // keys of all buffers
  int64_t room = 0;   // candidates that an image may keep of all levels
  int64_t groups = 0;      // in all; 0 where every level is selected from its parts at once
  int64_t group_slots = 0;  // keys that all groups may leave
};

// sizes: logits of an image, level by level. tile: logits that a block takes at a time; parts are whole tiles.
inline DetectPlan plan_detect(const std::vector<int64_t>& sizes, int64_t batch, int64_t topk, int64_t key_bytes,
                              int64_t tile, int64_t wanted_parts) {
  DetectPlan plan;
  int64_t logits = 0;
  int64_t largest = 1;
  for (const int64_t size : sizes) {
    logits += batch * size;
    largest = std::max(largest, size);
  }
  topk = std::min(topk, largest);  // so that no sum below overflows
  const int64_t buffer = topk + std::max(topk, kFewestFreed);
  const int64_t affordable = std::max<int64_t>(1, kDetectBufferBytes / (key_bytes * buffer));
  const int64_t parts = std::max<int64_t>(1, std::min(wanted_parts, affordable));
  plan.part = std::max<int64_t>(1, (logits + parts * tile - 1) / (parts * tile)) * tile;
  for (const int64_t size : sizes) {
    LevelPlan level{};
    level.parts = topk == 0 ? 0 : (size + plan.part - 1) / plan.part;
    level.first_part = plan.parts;
    level.capacity = std::min({buffer, plan.part, size});
    level.first_slot = plan.slots;
    level.most = std::min(topk, size);
    level.first = plan.room;
    plan.parts += batch * level.parts;
    plan.slots += batch * level.parts * level.capacity;
    plan.room += level.most;
    plan.levels.push_back(level);
  }
  const auto has_groups = [](const LevelPlan& level) { return level.parts > kSelectLists; };
  if (std::none_of(plan.levels.begin(), plan.levels.end(), has_groups)) return plan;
  for (LevelPlan& level : plan.levels) {
    level.groups = (level.parts + kSelectLists - 1) / kSelectLists;
    level.first_group = plan.groups;
    level.group_room = std::max(level.most, kSelectRoom);
    level.first_left = plan.group_slots;
    plan.groups += batch * level.groups;
    plan.group_slots += batch * level.groups * level.group_room;
  }
  return plan;
}

}  // namespace retinanet_ext
