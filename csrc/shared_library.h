// A library found at run time, so that the extension imports on machines without CUDA or a driver.
#pragma once

#include <dlfcn.h>
#include <link.h>

#include <stdexcept>
#include <string>
#include <vector>

namespace llmkern {

// An error with the library's own code and name; bindings.cpp turns it into llmkern._recorder.RecorderError.
class RecorderError : public std::runtime_error {
 public:
  RecorderError(const std::string& sentence, std::string name, int code = -1)
      : std::runtime_error(sentence), name_(std::move(name)), code_(code) {}
  const std::string& name() const { return name_; }
  int code() const { return code_; }

 private:
  std::string name_;
  int code_;
};

class SharedLibrary {
 public:
  // Prefers a copy that is already loaded and whose path contains `soname` (empty: none): two CUPTIs in a process
  // fight.
  SharedLibrary(const std::string& soname, const std::vector<std::string>& candidates, const std::string& advice) {
    const std::string loaded = soname.empty() ? std::string() : loaded_path(soname);
    if (!loaded.empty()) handle_ = dlopen(loaded.c_str(), RTLD_NOW | RTLD_NOLOAD);
    path_ = loaded;
    std::string reason;
    for (size_t i = 0; handle_ == nullptr && i < candidates.size(); ++i) {
      handle_ = dlopen(candidates[i].c_str(), RTLD_NOW | RTLD_LOCAL);
      path_ = candidates[i];
      if (handle_ == nullptr) reason = dlerror();
    }
    if (handle_ == nullptr) {
      throw RecorderError(soname + " cannot be loaded (" + (reason.empty() ? "no file tried" : reason) + "): " + advice,
                          "LIBRARY_NOT_FOUND");
    }
  }

  template <typename Function>
  Function find(const char* symbol) const {
    return reinterpret_cast<Function>(dlsym(handle_, symbol));
  }

  template <typename Function>
  Function need(const char* symbol) const {
    auto found = find<Function>(symbol);
    if (found == nullptr) {
      throw RecorderError(path_ + " has no function " + symbol + ": it is too old, install a newer one.",
                          "SYMBOL_NOT_FOUND");
    }
    return found;
  }

  const std::string& path() const { return path_; }

 private:
  static std::string loaded_path(const std::string& soname) {
    struct Search {
      const std::string& soname;
      std::string found;
    } search{soname, {}};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
          auto* s = static_cast<Search*>(data);
          if (info->dlpi_name != nullptr && std::string(info->dlpi_name).find(s->soname) != std::string::npos) {
            s->found = info->dlpi_name;
            return 1;
          }
          return 0;
        },
        &search);
    return search.found;
  }

  void* handle_ = nullptr;  // never closed: callbacks and threads of the library may outlive us
  std::string path_;
};

}  // namespace llmkern
