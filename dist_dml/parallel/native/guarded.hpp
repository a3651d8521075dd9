// What C++ throws, in words for Python.
#pragma once

#include <c10/util/Exception.h>

#include <cstdint>
#include <cstdio>
#include <exception>

namespace dist_dml {

template <class Call>
int guarded(char* message, int64_t size, Call call) {
  try {
    call();
    return 0;
  } catch (const c10::Error& error) {
    std::snprintf(message, size, "%s", error.what_without_backtrace());
  } catch (const std::exception& error) {
    std::snprintf(message, size, "%s", error.what());
  } catch (...) {
    std::snprintf(message, size, "an unknown exception");
  }
  return 1;
}

}  // namespace dist_dml
