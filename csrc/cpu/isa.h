// The instruction set in use.
#pragma once
#include <string>
#include <vector>

#include "kernels.h"

namespace sparsekern {

// The table that runs: the best one for this machine, or the one forced by set_cpu_isa.
const Kernels& kernels();

// Vectors of tokens per panel of spmm. Wide panels save broadcasts, narrow ones leave room in L1
// for more columns, so that sums go in and out of the L2 cache less often.
int64_t panel_vectors();

// Names of the tables this CPU can run, the plainest first.
std::vector<std::string> available_isas();

// Forces a table, for tests. False when this CPU cannot run it.
bool set_cpu_isa(const std::string& name);

}  // namespace sparsekern
