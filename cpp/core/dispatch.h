// The kernel tables in order of preference, and which of them this processor can run.
#pragma once

#include <span>
#include <string_view>

#include "kernels/table.h"

namespace fastopt {

std::span<const Table* const> built_tables();  // the best first; the last one runs everywhere
bool runs_here(const Table& table);
const Table* find_table(std::string_view isa);  // nullptr if it was not built

}  // namespace fastopt
